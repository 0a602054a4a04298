"""The module that engines wrap: one call signature for every kind of student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gkd_dist.errors import StudentError
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.losses.terms import Output
from gkd_dist.models.build import run_model
from gkd_dist.models.norm import collecting_norms, own_batch_norms
from gkd_dist.world import World

_HEADS = "heads."


class StudentModule(nn.Module):
    """A model whose forward takes a local graph and returns logits and further outputs as a tuple.

    ``heads`` are projections by the name of their loss term, and ``head_layers`` the layers (from 1)
    that they read. They are parameters of this module and not of ``model``, whose batch norms take
    their statistics over owned rows from now on.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, nn.Module] | None = None,
        head_layers: Mapping[str, int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        own_batch_norms(model)
        self.model, self.recompute = model, recompute
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.head_layers = dict(head_layers or {})
        self._check_names()

    def forward(self, x: Tensor, graph: LocalGraph, outputs: Sequence[Output] = ()) -> tuple[Tensor, ...]:
        """(logits [n, c], one tensor per output asked for): a layer [n, d_l], or a head [num_owned, d]."""
        layers = sorted({self._layer(output) for output in outputs})
        logits, kept = run_model(self.model, x, graph, layers, self.recompute)
        num_owned = x.size(0) if graph.num_owned is None else graph.num_owned
        found = (
            self.heads[output](kept[self._layer(output)][:num_owned]) if isinstance(output, str) else kept[output]
            for output in outputs
        )
        return (logits, *found)

    def _layer(self, output: Output) -> int:
        return self.head_layers[output] if isinstance(output, str) else output

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are not frozen: of the model by their own names, of heads as ``heads.<term>.<name>``."""
        yield from ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        yield from ((f"{_HEADS}{name}", value) for name, value in self.heads.named_parameters())

    def head_state(self) -> dict[str, Tensor]:
        """Weights of the heads as ``<term>.<name>``; whole only where the engine has gathered them."""
        return dict(self.heads.state_dict())

    def _check_names(self) -> None:
        taken = {name for name, _ in self.model.named_parameters()}
        clash = next((name for name, _ in self.heads.named_parameters() if f"{_HEADS}{name}" in taken), None)
        if clash is not None:
            raise StudentError(
                f"the model has a parameter {_HEADS}{clash}, which is what the projection of a loss is called; "
                "rename the model's heads"
            )


def as_student(model: nn.Module, recompute: bool = False) -> StudentModule:
    """``model`` itself where it is one already, or a student without heads; ``recompute`` layers in backward."""
    student = model if isinstance(model, StudentModule) else StudentModule(model)
    student.recompute = recompute
    return student


def call_module(
    module: nn.Module, batch: Batch, outputs: Sequence[Output], dtype: torch.dtype
) -> tuple[Tensor, dict[Output, Tensor]]:
    """Runs a (wrapped) `StudentModule` on a batch; results come back in fp32."""
    out = module(batch.x.to(dtype), batch.graph, tuple(outputs))
    return out[0].float(), {output: z.float() for output, z in zip(outputs, out[1:], strict=True)}


def merge_running_statistics(module: nn.Module, world: World) -> None:
    """Merges what batch norms saw in this step over all ranks, weighted by rows."""
    norms = collecting_norms(module)
    if not norms:
        return
    pending = [norm.take_pending() for norm in norms]
    merged = world.sum(torch.cat(pending))
    for norm, total in zip(norms, merged.split([p.numel() for p in pending]), strict=True):
        norm.merge(total)
