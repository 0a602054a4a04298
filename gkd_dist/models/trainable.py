"""Can a model be trained on parts of a graph? Found by looking at its modules, and by running it on nothing.

Inference needs a model whose answers do not depend on the cut (`gkd_dist.models.probe`); training needs
that its statistics in train mode do not either, that every layer runs on an empty batch, which a rank
without a unit has to, and that the layers exist which losses name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch_geometric import nn as pyg

from gkd_dist.config import LAYER_LOSSES, Loss
from gkd_dist.errors import GkdError, ModelError, StudentError
from gkd_dist.graph import Batch
from gkd_dist.models.basic_gnn import is_basic_gnn
from gkd_dist.models.build import no_layers, run_model
from gkd_dist.models.layered import is_layered, why_not_layered
from gkd_dist.models.norm import OwnedBatchNorm1d, is_replaceable
from gkd_dist.sampling import Sampler

_INSTEAD = "use batch_norm, which takes statistics over owned nodes, or layer_norm with norm_kwargs: {mode: node}"


def refuse_untrainable(model: nn.Module) -> None:
    """Raises `ModelError` for modules whose output in train mode depends on how the graph was cut."""
    for sentence in _untrainable(model):
        raise ModelError(sentence)


def _untrainable(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        if _is_foreign_batch_norm(path, module):
            yield (
                f"{name} takes statistics over all rows it gets, the halo included; use torch.nn.BatchNorm1d itself "
                "(no subclass) with track_running_stats, as a part of the model, or torch.nn.LayerNorm"
            )
        if isinstance(module, pyg.InstanceNorm | nn.modules.instancenorm._InstanceNorm):
            yield f"{name} normalises over all nodes of a graph in training, of which a part has only some; {_INSTEAD}"
        if isinstance(module, pyg.HeteroBatchNorm):
            yield f"{name} takes statistics over all rows it gets, the halo included; {_INSTEAD}"


def _is_foreign_batch_norm(path: str, module: nn.Module) -> bool:
    """Whether it stays as it is in training: neither one of ours nor replaced by one."""
    is_one = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_one and not isinstance(module, OwnedBatchNorm1d) and not is_replaceable(path, module)


def require_layers(model: nn.Module) -> None:
    """Raises `ModelError` for a model that cannot stop between two layers, where halo rows are exchanged."""
    reason = why_not_layered(model)
    if reason:
        raise ModelError(
            f"distill.halo is exchange, which works between layers, but {reason}; make it go layer by layer "
            "(docs/models.md), or set distill.halo=hops"
        )


def refuse_layers_that_are_not_there(model: nn.Module, losses: Sequence[Loss]) -> None:
    """Raises `ModelError` where a loss names a layer of a student that runs as a whole."""
    if is_layered(model):
        return
    for loss in losses:
        if isinstance(loss, LAYER_LOSSES):
            raise ModelError(
                f"a {loss.kind} loss reads layer {loss.student_layer} of the student, but {no_layers(model)}, "
                f"or remove the {loss.kind} loss"
            )


def sampler_for(model: nn.Module, fan_out: Sequence[int] | None) -> Sampler | None:
    """What chooses the neighbours that each layer of ``model`` looks at; `ModelError` for one that runs as a whole."""
    if fan_out is None:
        return None
    if not is_layered(model):
        raise ModelError(
            f"distill.fan_out is a number of neighbours for each layer, but {no_layers(model)}, or set "
            "distill.fan_out=null"
        )
    return Sampler(tuple(fan_out), bool(getattr(model, "rows_alone", False)))


def check_empty(model: nn.Module, empty: Batch, rank: int) -> None:
    """Forward and backward pass in train mode on an empty batch; `StudentError` where that fails.

    The parameters, their gradients and the random state stay as they are.
    """
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    batch, was_training = empty.to(device), model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            logits, _ = run_model(model, batch.x, batch.graph)
            wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if wanted and logits.requires_grad:
                torch.autograd.grad(logits.sum() * 0, wanted, allow_unused=True)
        found = "" if list(logits.shape[:1]) == [0] else f"it gave {list(logits.shape)} for no nodes"
    except GkdError:
        raise
    except Exception as error:  # whatever the user's own lines raise
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    finally:
        model.train(was_training)
    if found:
        raise StudentError(
            f"rank {rank}: {type(model).__name__} cannot run on a batch without nodes, which a rank has that gets no "
            f"unit in a step ({found}); {_remedy(model)}"
        )


def _remedy(model: nn.Module) -> str:
    if is_basic_gnn(model):
        return "choose other args (another jk, norm or aggregation)"
    return "make its forward accept x of shape [0, f] and edge_index of shape [2, 0]"
