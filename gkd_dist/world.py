"""Who this process is among its peers, and the few collectives the project needs.

The only door to ``torch.distributed``. A `World` is passed as an argument, never looked up, so a
test can be rank 3 of 8 in a single process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from gkd_dist.errors import ConfigError, StudentError


def _unknown() -> str:
    return ""


@dataclass
class Place:
    """Where a rank is in its work, for messages; whoever works there writes it, other threads read it."""

    doing: str = ""
    step: int | None = None
    unit: int | None = None
    others: Callable[[], str] = _unknown  # where the other ranks were last seen, as a sentence

    def __str__(self) -> str:
        words = [self.doing] if self.doing else []
        words += [f"step {self.step}"] if self.step is not None else []
        words += [f"unit {self.unit}"] if self.unit is not None else []
        return ", ".join(words)


@dataclass(frozen=True)
class World:
    """``rank`` of ``world_size`` processes, ``local_rank`` on its machine, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    place: Place = field(default_factory=Place, compare=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes what there is one of."""
        return self.rank == 0

    @classmethod
    def from_env(cls, use_gpu: bool = False) -> World:
        """From the variables that torchrun, the deepspeed launcher and Ray Train set."""
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "RANK and WORLD_SIZE are not set; start this under torchrun or the deepspeed launcher, "
                "or set distill.launcher=ray"
            ) from error
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(rank, size, local, torch.device("cuda", local) if use_gpu else torch.device("cpu"))

    def connect(self, timeout_s: float) -> None:
        """Creates the process group unless a launcher has: nccl on CUDA, gloo elsewhere.

        ``timeout_s`` bounds every collective. A world of one gets a group too, for engines that
        insist on one.
        """
        if dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        bound = timedelta(seconds=timeout_s)
        if self.world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=bound)
            return
        try:
            dist.init_process_group(backend, timeout=bound)
        except (RuntimeError, ValueError) as error:
            raise StudentError(
                f"rank {self.rank} of {self.world_size} could not join its peers at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} within {timeout_s:g} s; check the address, or set GLOO_SOCKET_IFNAME "
                "to the network interface that the machines share"
            ) from error

    def disconnect(self) -> None:
        """Leaves the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks; a new tensor on the device of ``values``.

        Raises `StudentError` naming this rank where a peer does not come within the time-out.
        """
        if self.world_size == 1:
            return values.clone()
        total = values.to(self.device, copy=True)
        with self.facing_peers():
            dist.all_reduce(total)
        return total.to(values.device)

    def broadcast(self, values: Tensor) -> Tensor:
        """``values`` of rank 0 on every rank; shapes and dtypes must agree."""
        if self.world_size == 1:
            return values
        shared = values.to(self.device, copy=True)
        with self.facing_peers():
            dist.broadcast(shared, src=0)
        return shared.to(values.device)

    def all_to_all(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], into: Tensor | None = None
    ) -> Tensor:
        """Blocks of ``rows`` to every rank, and the blocks that every rank has for this one, in the order of ranks.

        ``rows`` [sum(sent), ...]; ``sent`` and ``received`` are rows per rank, and each rank must expect what
        the others send. Returns [sum(received), ...] on the device of ``rows``, or fills ``into`` of that shape.
        """
        out = rows.new_empty(sum(received), *rows.shape[1:]) if into is None else into
        if self.world_size == 1:
            return out.copy_(rows)
        buffer = out if out.device == self.device and out.is_contiguous() else torch.empty_like(out, device=self.device)
        with self.facing_peers():
            dist.all_to_all_single(buffer, rows.to(self.device).contiguous(), list(received), list(sent))
        return out if buffer is out else out.copy_(buffer)

    @contextmanager
    def facing_peers(self) -> Iterator[None]:
        """A collective that did not come about, as a sentence that names who waited.

        Also around work with collectives of others in it. Other errors, of arithmetic, memory or a type that the
        backend does not have, stay what they are.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_of_peers(error):
                raise
            raise self._in_vain(error) from error

    def _in_vain(self, error: RuntimeError) -> StudentError:
        where, others = str(self.place), self.place.others()
        return StudentError(
            f"rank {self.rank} of {self.world_size} waited in vain for its peers{f' ({where})' if where else ''}: "
            f"{_first_line(error)}; {f'{others}; ' if others else ''}look at the logs of the other ranks, then run the "
            "same command again"
        )

    def mailbox(self) -> Any:
        """A connection of its own to the store through which the ranks have found each other.

        For a thread that may have to wait there, which must not keep the others waiting.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        return store.clone()

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.sum(torch.zeros(1))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def is_of_peers(error: BaseException) -> bool:
    """Whether a collective failed, and not the arithmetic around it: gloo's errors have no type of their own."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection closed by"))
    )
