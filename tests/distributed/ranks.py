"""Groups of ranks that stay: ``python -m tests.distributed.ranks``, driven by `tests.distributed.groups.Ranks`.

Importing torch and DeepSpeed takes longer than a case. This process imports once and forks the ranks of a world
size when the first case of that size comes; they join one process group and go on from case to case.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gkd_dist.distill import module, trainer
from gkd_dist.distill.engine import DeepSpeedEngine, import_deepspeed
from gkd_dist.distill.step import seeded
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.graph import Batch
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.distributed.cases import Case
from tests.distributed.exchanged import measure
from tests.distributed.groups import free_port


class LocalCounts(World):
    """Divides by what a rank has seen itself, as a mean per rank does."""

    def sum(self, values: Tensor) -> Tensor:
        return values * self.world_size


class AveragedLoss(DeepSpeedEngine):
    """Leaves the average over ranks in the gradient."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss / self._world.world_size, last=last)


class DividedByMicroSteps(DeepSpeedEngine):
    """Lets DeepSpeed divide by the micro-steps, its default."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.backward(loss)
        if not last:
            self._engine.step()


class NoForwardWithoutUnits(DeepSpeedEngine):
    """Does not run the modules where there is no unit."""

    def forward(self, batch: Batch, layers: Any) -> tuple[Tensor, dict[int, Tensor]]:
        if batch.graph.num_nodes:
            return super().forward(batch, layers)
        nothing = sum(parameter.sum() for parameter in self.module.parameters()) * 0
        logits = torch.zeros(0, 3) + nothing
        return logits, {layer: logits[:, :1] for layer in layers}


ENGINES = {
    "averaged loss": AveragedLoss,
    "divided by micro-steps": DividedByMicroSteps,
    "no forward without units": NoForwardWithoutUnits,
}


def train(world: World, store: str, stage: int, case: dict[str, Any], out: str) -> None:
    """Trains a case; rank 0 writes the last weights (not the best ones) to ``out``."""
    it = Case(**case)
    if it.sabotage == "local counts":
        world = LocalCounts(world.rank, world.world_size, world.local_rank, world.device)
    storage, config = Storage.open(store), it.config(stage, world.world_size)
    engine = ENGINES.get(it.sabotage, DeepSpeedEngine)
    running = Trainer(
        it.task(storage, os.path.basename(out), config), world, lambda model, steps: engine(model, config, world, steps)
    )
    running.engine.close, close = lambda: None, running.engine.close  # type: ignore[method-assign]
    with _sabotaged(it.sabotage, world):
        running.run()
    state = running.engine.model_state() | prefixed(running.engine.optimizer_state())
    Path(f"{out}.bytes-{world.rank}").write_text(str(running.engine.optimizer_bytes()))
    close()
    if world.is_main:
        torch.save(state, out)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of an optimizer beside that of a model; without its count of steps, which engines keep differently."""
    return {f"optimizer/{name}": value for name, value in state.items() if not name.endswith("/step")}


def _sabotaged(how: str, world: World) -> AbstractContextManager[object]:
    """A context in which functions of the training loop are not what they are."""
    if how == "statistics stay local":
        return patch.object(
            trainer, "merge_running_statistics", lambda m, w: module.merge_running_statistics(m, World())
        )
    if how == "seeded by rank":
        return patch("gkd_dist.distill.step.seeded", lambda device, *counters: seeded(device, world.rank, *counters))
    return nullcontext()


ACTIONS = {"train": train, "measure": measure}


def rank_main(rank: int, world_size: int, port: int, requests: Connection) -> None:
    """One rank: does what it is told until the pipe closes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    world = World.from_env()
    world.connect(30)
    prepare_process(1)
    while True:
        try:
            request = requests.recv()
        except EOFError:
            break
        try:
            ACTIONS[request.pop("what", "train")](world, **request)
            requests.send("")
        except BaseException:
            requests.send(traceback.format_exc())
            break
    os._exit(0)  # a broken group would wait for its peers


def main() -> None:
    """Answers each line of standard input, a request, with a line: what went wrong, or an empty string."""
    import_deepspeed(torch.device("cpu"))
    import_module("torch._inductor.compile_fx")  # ZeRO would, in every rank
    groups: dict[int, list[Connection]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        world_size = request.pop("world_size")
        if world_size not in groups:
            groups[world_size] = _start(world_size)
        for connection in groups[world_size]:
            connection.send(request)
        failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(map(_answer, groups[world_size])) if text]
        if failed:
            del groups[world_size]
        print(json.dumps("\n".join(failed)), file=answers, flush=True)


def _answer(connection: Connection) -> str:
    try:
        return str(connection.recv())
    except EOFError:
        return "died without a word"


def _start(world_size: int) -> list[Connection]:
    fork, port = multiprocessing.get_context("fork"), free_port()
    mine = []
    for rank in range(world_size):
        here, there = fork.Pipe()
        fork.Process(target=rank_main, args=(rank, world_size, port, there), daemon=True).start()
        there.close()
        mine.append(here)
    return mine


if __name__ == "__main__":
    main()
