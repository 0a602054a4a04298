"""The share of the graph that stays with one rank, in place of a stream of units (``distill.halo: exchange``).

Every rank merges its parts into one batch, reads it once and keeps it. An optimizer step is one forward and
backward pass over the whole graph, in which each rank computes the nodes it owns.

Shapes: ``n`` local nodes, the first ``num_owned`` of them owned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from gkd_dist.config import DistillConfig, TrainConfig
from gkd_dist.distill.exchange import HaloExchange, HaloPlan, rows_to_send, share_parts
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.partition.store import GraphStore
from gkd_dist.sparse import CsrPattern
from gkd_dist.stream.order import Position
from gkd_dist.stream.units import UnitLoader, part_costs
from gkd_dist.world import World

HOPS = 1  # a layer reads its in-neighbours; what is further away arrives with the exchange of the layer below
_SENDS = ("send_part", "send_ptr", "send_rows", "n_id", "halo_owner")


@dataclass(frozen=True)
class WholeGraphPlan:
    """The order of a run in which every step is the whole graph: one unit per rank, one micro-step."""

    full_step: int  # ranks
    steps_per_epoch: int = 1

    def walk(self, start: Position, epochs: int, rank: int, world_size: int) -> Iterator[tuple[Position, int]]:
        """The unit of ``rank`` once for every step from ``start`` to the end of epoch ``epochs - 1``."""
        yield from ((Position(epoch, 0), rank) for epoch in range(start.epoch, epochs))


def exchanges(config: TrainConfig) -> bool:
    """Whether training keeps the parts on their ranks."""
    return isinstance(config, DistillConfig) and config.halo == "exchange"


def shares_of(graph: GraphStore, world_size: int) -> list[tuple[int, ...]]:
    """Parts of each rank; ranks beyond the number of parts have none."""
    return share_parts(part_costs(graph.manifest), world_size)


class ResidentShare:
    """The parts of this rank as one batch, whose halo rows come from the ranks that own them.

    ``loader`` has one unit per rank and uses `HOPS`. The batch is made on first use, which is collective.
    """

    def __init__(self, loader: UnitLoader, world: World) -> None:
        self.loader, self.world = loader, world
        self.wait_s = 0.0
        self._batch: Batch | None = None

    def batch(self) -> Batch:
        """The batch of this rank on its device; an empty one, which takes part all the same, where it has no parts."""
        if self._batch is None:
            started = time.perf_counter()
            self._batch = load_share(self.loader, self.world)
            self.wait_s += time.perf_counter() - started
        return self._batch

    def stream(self, order: Iterator[tuple[Position, int | None]]) -> ResidentStream:
        """The batch, at every place of ``order``."""
        return ResidentStream(self, order)


class Stream(Protocol):
    """What the training loop needs of whatever delivers its batches."""

    @property
    def wait_s(self) -> float:
        """Seconds that the loop has waited for batches."""

    def __next__(self) -> tuple[Position, Batch]: ...

    def take(self, count: int) -> list[Batch]:
        """The next ``count`` batches."""

    def settle(self) -> None:
        """Weighs what was delivered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class ResidentStream:
    """What the training loop needs of a stream, for a batch that is there."""

    def __init__(self, share: ResidentShare, order: Iterator[tuple[Position, int | None]]) -> None:
        self._share, self._order = share, order

    @property
    def wait_s(self) -> float:
        """Seconds that reading took."""
        return self._share.wait_s

    def __iter__(self) -> Iterator[tuple[Position, Batch]]:
        return self

    def __next__(self) -> tuple[Position, Batch]:
        position, _ = next(self._order)
        return position, self._share.batch()

    def take(self, count: int) -> list[Batch]:
        """The same batch ``count`` times."""
        return [next(self)[1] for _ in range(count)]

    def settle(self) -> None:
        """Nothing is dropped, so nothing has to be weighed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def load_share(loader: UnitLoader, world: World) -> Batch:
    """Reads the parts of this rank and connects their halo with the ranks that own it; collective."""
    batch, plan = plan_share(loader, world.rank)
    halo = HaloExchange(plan.to(world.device), world)
    halo.check()
    batch = batch.to(world.device)
    batch.graph.halo = halo
    return batch


def plan_share(loader: UnitLoader, rank: int) -> tuple[Batch, HaloPlan]:
    """The merged parts of ``rank``, of which ``loader`` has one unit per rank, and what it will send and get."""
    shares = loader.units
    parts = {part: loader.graph.part(part, _SENDS) for part in shares[rank]}
    owned = {part: loader.graph.manifest.parts[part].counts["num_owned"] for part in parts}
    batch = loader.load(rank) if parts else loader.empty()
    receive_counts = [0] * len(shares)
    if parts:
        owners = _halo_ranks(batch.n_id[batch.num_owned :], parts, owned, shares)
        receive_counts = torch.bincount(owners, minlength=len(shares)).tolist()
        batch = _by_rank(batch, owners)
    return batch, HaloPlan.of(batch.num_owned, rows_to_send(parts, owned, shares, rank), receive_counts)


def _halo_ranks(
    n_id: Tensor, parts: dict[int, dict[str, Tensor]], owned: dict[int, int], shares: list[tuple[int, ...]]
) -> Tensor:
    """Rank that owns each halo node ``n_id`` of the merged parts, int64."""
    ids = torch.cat([tensors["n_id"][owned[part] :] for part, tensors in parts.items()])
    owner = torch.cat([tensors["halo_owner"].long() for tensors in parts.values()])
    order = torch.argsort(ids)
    rank_of = torch.empty(sum(len(share) for share in shares), dtype=torch.int64)
    for rank, share in enumerate(shares):
        rank_of[list(share)] = rank
    return rank_of[owner[order[torch.searchsorted(ids[order], n_id)]]]


def _by_rank(batch: Batch, owners: Tensor) -> Batch:
    """The batch with its halo nodes ordered by the rank that owns them, and else as before."""
    if bool((owners[1:] >= owners[:-1]).all()):
        return batch
    first, graph = batch.num_owned, batch.graph
    nodes = torch.cat([torch.arange(first), first + torch.argsort(owners, stable=True)])
    place = torch.empty_like(nodes)
    place[nodes] = torch.arange(nodes.numel())
    n_id = batch.n_id[nodes]
    moved = LocalGraph(
        CsrPattern.from_csr(graph.pattern.indptr, place[graph.pattern.indices]),  # halo nodes have no rows to move
        graph.in_degree[nodes],
        graph.has_self_loop[nodes],
        graph.edge_weight,
        graph.num_owned,
        graph.edge_attr,
        n_id,
    )
    return replace(batch, graph=moved, x=batch.x[nodes], n_id=n_id)
