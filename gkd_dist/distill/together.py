"""All ranks wait for work of rank 0, for as long as rank 0 lives.

Rank 0 alone writes to the store. What the others wait for is not bounded by the time-out of a
collective, and not by the silence after which a rank counts as dead: they ask in rounds, so they
stay and go on giving signs of life. What went wrong is known to all of them after the same round.
"""

from __future__ import annotations

from typing import Protocol

import torch

from gkd_dist.world import World

ROUND_S = 1.0


class Work(Protocol):
    """What rank 0 does beside the loop."""

    @property
    def failed(self) -> bool: ...
    def is_busy(self, patience_s: float) -> bool:
        """Whether there is still work to do after ``patience_s`` at most."""
        ...


def failed_together(world: World, work: Work | None) -> bool:
    """Waits on all ranks until the ``work`` of rank 0 is done, and returns on all of them whether it has failed.

    All ranks must call; ``work`` is None where there is none.
    """
    while True:
        busy = work is not None and work.is_busy(ROUND_S)
        failed = work is not None and work.failed
        still_busy, any_failed = world.sum(torch.tensor([busy, failed], dtype=torch.float64)).tolist()
        if not still_busy:
            return bool(any_failed)
