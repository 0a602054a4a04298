"""Checkpoints of a training run: free of world size and stage, committed last.

::

    checkpoints/writer.json                    who may write here, see `saving`
    checkpoints/latest.json                    steps that are committed, oldest first
    checkpoints/step-00000500/state-<sha8>.safetensors   model/..., heads/..., best/..., optimizer/<parameter>/<key>
    checkpoints/step-00000500/COMMIT.json      digests, position, early stopping, sigmas

A checkpoint counts once ``COMMIT.json`` is there and its digest fits; a damaged one is passed over
for the one before it. Its data are named by their content, so that two writers that do not know of
each other never mix: the commit that stays names the data that belong to it. The best weights so
far are in every checkpoint, so no number of newer ones can push them out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gkd_dist import layout
from gkd_dist.errors import DataError, ObjectNotFoundError, StudentError
from gkd_dist.shards.codec import decode, encode
from gkd_dist.shards.seal import SEAL, is_sealed, sealed
from gkd_dist.storage import Storage
from gkd_dist.world import World

log = logging.getLogger(__name__)
FORMAT_VERSION = 4  # 1 had no seal, 2 did not name its data, 3 did not say whether scores were compiled
LATEST = f"{layout.CHECKPOINTS}/latest.json"
_UNNAMED = "state.safetensors"  # data of versions 1 and 2


@dataclass
class TrainState:
    """Everything a training run is, between two steps."""

    position: tuple[int, int] = (0, 0)  # next (epoch, step in it)
    global_step: int = 0
    best_metric: float = -1.0
    best_epoch: int = -1
    bad_evals: int = 0
    sigmas: dict[str, float] = field(default_factory=dict)
    stopped: bool = False
    model: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)  # projections of loss terms, no part of the model
    compiled: bool | None = None  # edge scores by the compiler or in chunks; None: not decided, or a format before 4
    made_with: dict[str, str | int] = field(default_factory=dict)  # what bits depend on: ranks, threads, processor


_GROUPS = ("model", "heads", "best", "optimizer")
_PLAIN = ("position", "global_step", "best_metric", "best_epoch", "bad_evals", "sigmas", "stopped", "compiled")


def _anyone() -> None:
    """Where there is one writer, nobody has to be asked."""


def save_checkpoint(
    storage: Storage, state: TrainState, fingerprint: str, keep: int, may_commit: Callable[[], None] = _anyone
) -> None:
    """Writes the checkpoint of ``state.global_step`` and drops all but the last ``keep``.

    ``may_commit`` is called before each write that makes or unmakes a checkpoint; what it raises
    leaves those that are there as they are.
    """
    folder = layout.checkpoint(state.global_step)
    tensors = {f"{group}/{name}": value for group in _GROUPS for name, value in getattr(state, group).items()}
    data = encode({name: value.contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    document = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "data": f"state-{digest[:8]}.safetensors",
        "num_bytes": len(data),
        "sha256": digest,
        "made_with": state.made_with,
        **{name: getattr(state, name) for name in _PLAIN},
    }
    storage.write(f"{folder}/{document['data']}", data)
    may_commit()
    storage.write_json(f"{folder}/{layout.COMMIT}", sealed(document))
    may_commit()
    steps = [step for step in committed_steps(storage) if step != state.global_step] + [state.global_step]
    storage.write_json(LATEST, steps[-keep:])
    may_commit()
    kept = committed_steps(storage)  # by whoever has written last
    for step in steps[:-keep]:
        if kept and step < kept[0]:
            storage.delete_tree(layout.checkpoint(step))


def delete_uncommitted(storage: Storage) -> list[str]:
    """Removes what writers that were killed have left: folders of steps that are not in ``latest.json``."""
    listed = {layout.checkpoint(step) for step in committed_steps(storage)}
    keys = storage.list(layout.CHECKPOINTS) + storage.list(layout.CHECKPOINTS, leftovers=True)
    folders = {"/".join(key.split("/")[:2]) for key in keys if key.startswith(f"{layout.CHECKPOINTS}/step-")}
    orphans = sorted(folders - listed)
    for folder in orphans:
        storage.delete_tree(folder)
    return orphans


def committed_steps(storage: Storage) -> list[int]:
    """Steps with a checkpoint, oldest first; empty where there is none or the list is damaged."""
    try:
        steps = storage.read_json(LATEST)
    except (ObjectNotFoundError, ValueError, DataError):
        return []
    return [step for step in steps if isinstance(step, int)] if isinstance(steps, list) else []


def load_checkpoint(storage: Storage, fingerprint: str, only: int | None = None) -> TrainState | None:
    """The newest whole checkpoint of the run with this fingerprint, or None; ``only`` of that step."""
    for step in reversed(committed_steps(storage)) if only is None else (only,):
        try:
            state = _read(storage, step, fingerprint)
        except (ObjectNotFoundError, DataError, ArithmeticError, ValueError, LookupError, TypeError) as error:
            log.warning("checkpoint of step %d in %s is damaged (%s); trying the one before", step, storage.url, error)
            continue
        if state is not None:
            return state
    return None


def agree_on_checkpoint(storage: Storage, fingerprint: str, world: World) -> TrainState:
    """Where to go on: rank 0 chooses the checkpoint, all others load that one or raise `StudentError`."""
    state = load_checkpoint(storage, fingerprint) if world.is_main else None
    chosen = world.broadcast(torch.tensor([-1 if state is None else state.global_step]))
    step = int(chosen[0])
    if step < 0:
        return TrainState()
    state = state or load_checkpoint(storage, fingerprint, only=step)
    if state is None:
        raise StudentError(
            f"rank {world.rank} cannot read the checkpoint of step {step} in {storage.url}, which rank 0 goes on "
            "from; run the same command again"
        )
    return state


def _read(storage: Storage, step: int, fingerprint: str) -> TrainState | None:
    folder = layout.checkpoint(step)
    commit: dict[str, Any] = storage.read_json(f"{folder}/{layout.COMMIT}")
    version = commit["format_version"]
    if version > FORMAT_VERSION:
        return None
    if not (is_sealed(commit) if version > 1 else SEAL not in commit):
        raise DataError("COMMIT.json does not match its seal")
    if commit["fingerprint"] != fingerprint:
        return None
    data = storage.read(f"{folder}/{commit['data'] if version > 2 else _UNNAMED}")
    if len(data) != commit["num_bytes"] or hashlib.sha256(data).hexdigest() != commit["sha256"]:
        raise DataError("size or digest differ from COMMIT.json")
    plain = {name: commit[name] for name in _PLAIN if version > 3 or name != "compiled"}
    state = TrainState(**plain, made_with=dict(commit.get("made_with", {})))
    state.position = (int(commit["position"][0]), int(commit["position"][1]))
    for key, value in decode(data).items():
        group, _, name = key.partition("/")
        if group not in _GROUPS:
            raise DataError(f"it holds the unknown tensor {key}")
        getattr(state, group)[name] = value
    return state
