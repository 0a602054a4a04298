"""What DeepSpeed adds to a training step: ZeRO 0 and 1 against bare DistributedDataParallel, two gloo workers.

All engines live in the same two processes, do the same steps (same student, batches, objective, optimizer, clipping)
and take turns, so that a noisy machine is noisy for all. ``parts`` says where the time of a step goes: ``forward``,
``backward`` (with the reduction of gradients), ``step`` (norm, clipping, optimizer), and ``rest``, the step's own
two sums over ranks and its bookkeeping, which is the same code for all.

    python benchmarks/bench_engine.py                                # two minutes
    python benchmarks/bench_engine.py --nodes 1000 --rounds 2 --steps 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from engine_ranks import DdpEngine, config_of, make_batch, make_model, make_objective, run_ranks
from environment import describe, save

from gkd_dist.distill.engine import DeepSpeedEngine
from gkd_dist.distill.step import train_step
from gkd_dist.distill.trainer import prepare_process
from gkd_dist.world import World

STUDENTS = {"gcn-2x16": {"layers": 2, "hidden": 16}, "gcn-3x128": {"layers": 3, "hidden": 128}}
SIDES = ("ddp", "zero0", "zero1")
PARTS = ("forward", "backward", "step")
TARGET = 0.15


class Timed:
    """An engine whose methods are timed."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, dict.fromkeys(PARTS, 0.0)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.engine, name)
        if name not in PARTS:
            return method

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


def one_rank(request: dict[str, Any]) -> None:
    """Seconds per step of each side and round, and the parts of the last round."""
    world = World.from_env()
    world.connect(120)
    prepare_process(1)
    model, steps = request["model"], request["steps"]
    objective = make_objective(model["layers"])
    batches = [make_batch(world.rank, request["nodes"], request["degree"])]
    engines = {"ddp": Timed(DdpEngine(make_model(model), config_of(0)))}
    for stage in (0, 1):
        engines[f"zero{stage}"] = Timed(DeepSpeedEngine(make_model(model), config_of(stage), world, 1))
    found: dict[str, Any] = {side: [] for side in SIDES}
    for turn in range(-1, request["rounds"]):  # the first one warms up
        for side in SIDES if turn % 2 else reversed(SIDES):
            engine = engines[side]
            engine.seconds = dict.fromkeys(PARTS, 0.0)
            world.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            for step in range(steps):
                train_step(engine, objective, batches, world, seed=0, epoch=0, step=step)  # type: ignore[arg-type]
            wall, cpu = (time.perf_counter() - started) / steps, (time.process_time() - cpu) / steps
            parts = {name: seconds / steps for name, seconds in engine.seconds.items()}
            if turn >= 0:
                found[side].append({"wall": wall, "cpu": cpu, **parts, "rest": wall - sum(parts.values())})
    states = [engine.module.state_dict() for engine in engines.values()]
    found["difference"] = max(
        float((state[name] - value).abs().max()) for state in states for name, value in states[0].items()
    )
    print(json.dumps(found), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of the slower rank, and the overhead of each ZeRO stage over DDP."""
    request = {"model": STUDENTS[name], "nodes": args.nodes, "degree": args.degree}
    request |= {"rounds": args.rounds, "steps": args.steps}
    ranks = run_ranks(__file__, 2, request)
    keys = ("wall", "cpu", *PARTS, "rest")
    result: dict[str, Any] = {
        side: {key: max(statistics.median(r[key] for r in rank[side]) for rank in ranks) for key in keys}
        for side in SIDES
    }
    for side in SIDES[1:]:
        ratios = [
            max(rank[side][i]["wall"] for rank in ranks) / max(rank["ddp"][i]["wall"] for rank in ranks)
            for i in range(args.rounds)
        ]
        result[side] |= {
            "overhead": statistics.median(ratios) - 1,
            "overhead_cpu": result[side]["cpu"] / result["ddp"]["cpu"] - 1,
            "added_s": result[side]["wall"] - result["ddp"]["wall"],
        }
    result["largest_difference_of_weights"] = max(rank["difference"] for rank in ranks)
    print(f"{name}: a step of {args.nodes:,} nodes and {args.nodes * args.degree:,} edges per worker")
    for side in SIDES:
        row = "  ".join(f"{key} {1000 * result[side][key]:7.2f} ms" for key in keys)
        over = f"  overhead {100 * result[side]['overhead']:5.1f} %" if side != "ddp" else ""
        print(f"  {side:6s} {row}{over}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000, help="per worker and step")
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="per turn")
    parser.add_argument("--save", action="store_true", help="write the result")
    args = parser.parse_args()
    result = {name: measure(name, args) for name in STUDENTS}
    if args.save:
        save("engine-gloo2", {"settings": vars(args), "target": TARGET, "environment": describe(), "students": result})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        torch.set_num_threads(1)
        one_rank(json.loads(sys.argv[2]))
    else:
        main()
