"""Whether the edge scores of a training run are compiled: decided once, kept, and said once.

Compiled and other scores differ in the last bits, so a run that is resumed goes on with what its
checkpoint says, and where the machine cannot, that is said.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from gkd_dist.errors import ConfigError
from gkd_dist.losses.fused import compiler_problem
from gkd_dist.world import World

log = logging.getLogger(__name__)
Setting = Literal["auto"] | bool

WORTH_IT = 2e11
"""Edge values of a run from which compiling pays: it saves about 0.2 ns for each and costs 10 to 20 s."""


def edge_values(num_edges: int, width: int, epochs: int) -> float:
    """Values that all edge scores of a run are computed from."""
    return float(num_edges) * width * epochs


def wants_compiled(setting: Setting, values: float) -> bool:
    """What a new run wants: a function of its configuration and its graph alone, equal on all ranks."""
    return values >= WORTH_IT if setting == "auto" else setting


def choose_compiled(setting: Setting, recorded: bool | None, values: float, world: World) -> bool:
    """The choice for this process, the same on all ranks, all of which must call.

    ``recorded`` is what the checkpoint says that the run goes on from, None for a new run. Raises
    `ConfigError` on all ranks where ``setting`` is true and one of them has no compiler.
    """
    wanted = recorded if recorded is not None and setting == "auto" else wants_compiled(setting, values)
    problem = compiler_problem(world.device) if wanted else None
    failed = int(world.sum(torch.tensor([problem is not None], dtype=torch.int64))[0])
    chosen = wanted and not failed
    if failed and setting is True:
        raise ConfigError(
            f"distill.compile is true, but edge scores cannot be compiled on {failed} of {world.world_size} workers "
            f"({problem or 'this one can'}); install a C++ compiler (g++) there, or set distill.compile=auto"
        )
    if world.is_main:
        _say(chosen, recorded, failed, problem)
    return chosen


def _say(chosen: bool, recorded: bool | None, failed: int, problem: str | None) -> None:
    if recorded is not None and chosen != recorded:
        before, now = ("compiled", "in chunks") if recorded else ("in chunks", "compiled")
        log.warning(
            "edge scores were %s before the checkpoint and are %s from here on%s: weights may differ in the last bits",
            before,
            now,
            f" ({_why(failed, problem)})" if failed else "",
        )
    elif failed:
        log.warning("edge scores are computed in chunks: %s", _why(failed, problem))
    elif chosen:
        log.info("edge scores are compiled")


def _why(failed: int, problem: str | None) -> str:
    return f"{failed} of the workers cannot compile them: {problem or 'not this one'}; is a C++ compiler (g++) there?"
