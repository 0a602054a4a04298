"""Halo rows from the ranks that own them: the plan as a pure function, the exchange as a differentiable collective.

Every rank holds some parts of the graph, merged, with one hop of halo around them. Its halo nodes are
ordered by the rank that owns them, then as they are stored, so that what arrives is a block of rows in place::

    forward    rank r:  owned rows that others read  --all-to-all-->  rows of its halo nodes
    backward   rank r:  gradients of its halo rows   --all-to-all-->  added to the owned rows they came from

Who sends what follows from the parts' own send plans, without a message. Every exchange is collective.

Shapes: ``n`` local nodes, the first ``o`` of them owned; ``s`` rows sent; ``d`` channels; ``w`` ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_dist.errors import GraphError
from gkd_dist.losses.precision import at_least_fp32
from gkd_dist.sparse import indptr_from_counts, segment_sum
from gkd_dist.world import World

_BALANCE = 1.1  # how much heavier the heaviest share may be, for the sake of neighbouring parts


def share_parts(costs: Sequence[float], world_size: int) -> list[tuple[int, ...]]:
    """Parts of each rank, ascending: a function of the parts' costs alone.

    Parts with neighbouring numbers tend to be neighbours in the graph, so each rank gets a run of them
    where that is as balanced (within 10 %) as dealing the heaviest part to the lightest rank, over and over.
    """
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for part in sorted(range(len(costs)), key=lambda part: (-costs[part], part)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], rank))
        dealt[rank].append(part)
        loads[rank] += costs[part]
    runs = _runs(costs, world_size, _BALANCE * max(loads))
    return [tuple(sorted(parts)) for parts in (dealt if runs is None else runs)]


def _runs(costs: Sequence[float], world_size: int, limit: float) -> list[list[int]] | None:
    """Runs of consecutive parts, each as close to the mean of what is left as it gets; None where one is too heavy."""
    runs: list[list[int]] = []
    rest, start = float(sum(costs)), 0
    for rank in range(world_size):
        mean, load, stop = rest / (world_size - rank), 0.0, start
        while stop < len(costs) and (stop == start or load + costs[stop] / 2 <= mean):
            load += costs[stop]
            stop += 1
        if load > limit:
            return None
        runs.append(list(range(start, stop)))
        rest, start = rest - load, stop
    return runs if start == len(costs) else None


@dataclass(frozen=True)
class HaloPlan:
    """What one rank sends and gets.

    ``send_rows`` int64 [s] are owned rows, by receiving rank; ``send_counts`` and ``receive_counts`` [w]
    say how many go to and come from each rank. ``boundary`` are the distinct rows of ``send_rows``, and
    segment k of ``order`` by ``indptr`` the places of ``send_rows`` that hold the k-th of them, by rank.
    """

    num_owned: int
    send_rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    boundary: Tensor
    order: Tensor
    indptr: Tensor

    @classmethod
    def of(cls, num_owned: int, send_rows: Sequence[Tensor], receive_counts: Sequence[int]) -> HaloPlan:
        """From the rows for each rank, int64."""
        rows = torch.cat(list(send_rows))
        boundary, counts = torch.unique(rows, return_counts=True)
        sent = tuple(block.numel() for block in send_rows)
        order = torch.argsort(rows, stable=True)
        return cls(num_owned, rows, sent, tuple(receive_counts), boundary, order, indptr_from_counts(counts))

    @property
    def num_nodes(self) -> int:
        """n."""
        return self.num_owned + sum(self.receive_counts)

    def to(self, device: torch.device) -> HaloPlan:
        """The same plan with its tensors on ``device``."""
        move = [tensor.to(device) for tensor in (self.send_rows, self.boundary, self.order, self.indptr)]
        return HaloPlan(self.num_owned, move[0], self.send_counts, self.receive_counts, *move[1:])


def rows_to_send(
    parts: Mapping[int, Mapping[str, Tensor]], num_owned: Mapping[int, int], shares: Sequence[Sequence[int]], rank: int
) -> list[Tensor]:
    """Owned rows of ``rank`` that each rank has in its halo, ordered by (part, ``n_id``); none for itself.

    ``parts`` are its own parts by index, with their ``send_part``, ``send_ptr`` and ``send_rows``;
    merged, their owned rows lie one part after the other.
    """
    rank_of = {part: owner for owner, share in enumerate(shares) for part in share}
    wanted: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64)] for _ in shares]
    first = 0
    for part in sorted(parts):
        tensors, blocks = parts[part], [list[Tensor]() for _ in shares]
        bounds = tensors["send_ptr"].tolist()
        for receiver, start, stop in zip(tensors["send_part"].tolist(), bounds, bounds[1:], strict=False):
            blocks[rank_of[receiver]].append(tensors["send_rows"][start:stop].long())
        for receiver, block in enumerate(blocks):
            if block and receiver != rank:
                wanted[receiver].append(torch.unique(torch.cat(block)) + first)  # two of its parts may read one row
        first += num_owned[part]
    return [torch.cat(block) for block in wanted]


class HaloExchange:
    """The rows of halo nodes of one rank; every method is collective."""

    def __init__(self, plan: HaloPlan, world: World) -> None:
        self.plan, self.world = plan, world

    def check(self) -> None:
        """Raises `GraphError` on every rank that would get another number of rows than the others send."""
        sent = torch.tensor(self.plan.send_counts)
        ones = (1,) * self.world.world_size
        coming = tuple(self.world.all_to_all(sent, ones, ones).tolist())
        wrong = int(coming != self.plan.receive_counts)
        if int(self.world.sum(torch.tensor([wrong]))[0]):
            raise GraphError(
                "the parts of the graph store do not agree on which rows they read of one another; "
                "run `gkd verify`, then `gkd partition` again"
            )

    def fill(self, owned: Tensor) -> Tensor:
        """Rows of all nodes [n, d] from the owned ones [o, d], those of others from their ranks."""
        if owned.dim() != 2 or owned.size(0) != self.plan.num_owned:
            raise GraphError(
                f"an exchange needs the {self.plan.num_owned} owned rows (got {list(owned.shape)}); "
                "give it the output of a layer at the owned nodes"
            )
        out: Tensor = _Fill.apply(owned, self)
        return out

    def total(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks."""
        out: Tensor = _Total.apply(values, self.world)
        return out


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, owned: Tensor, halo: HaloExchange) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.halo, plan = halo, halo.plan
        out = owned.new_empty(plan.num_nodes, owned.size(1))
        out[: plan.num_owned] = owned
        rows = owned.index_select(0, plan.send_rows)
        halo.world.all_to_all(rows, plan.send_counts, plan.receive_counts, into=out[plan.num_owned :])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        halo: HaloExchange = ctx.halo
        plan = halo.plan
        back = halo.world.all_to_all(grad[plan.num_owned :], plan.receive_counts, plan.send_counts)
        out = grad[: plan.num_owned].clone()
        # What several ranks say of one row is added by rank, in fp32: the same bits every time.
        sums = segment_sum(at_least_fp32(back.index_select(0, plan.order)), plan.indptr)
        out.index_add_(0, plan.boundary, sums.to(out.dtype))
        return out, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, world: World) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.world = world
        return world.sum(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return ctx.world.sum(grad), None
