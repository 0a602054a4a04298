"""What ZeRO saves and costs: optimizer state, memory and step time per stage, for two kinds of students.

Two gloo workers, a fresh pair of processes for each stage. ``optimizer`` are the bytes of the optimizer's state on a
rank (AdamW: two moments), ``peak`` the highest resident memory of a rank above what it had with its data and the
imported libraries, before the model was built. The embedding-heavy student has a learned vector for each of
``--table-nodes`` nodes, of which a step touches ``--nodes`` per rank.

    python benchmarks/bench_zero.py --save                                          # five minutes, 3 GB of memory
    python benchmarks/bench_zero.py --nodes 500 --table-nodes 20000 --steps 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from engine_ranks import config_of, make_batch, make_model, make_objective, run_ranks
from environment import describe, save

from gkd_dist.distill.engine import DeepSpeedEngine, import_deepspeed
from gkd_dist.distill.step import train_step
from gkd_dist.distill.trainer import prepare_process
from gkd_dist.telemetry import peak_rss_bytes
from gkd_dist.world import World


def one_rank(request: dict[str, Any]) -> None:
    """Bytes and seconds of this rank."""
    world = World.from_env()
    world.connect(120)
    prepare_process(1)
    import_deepspeed(world.device)
    model, stage, count = request["model"], request["stage"], request["nodes"]
    objective, batches = make_objective(model["layers"]), [make_batch(world.rank, count, 10, world.rank * count)]
    before = peak_rss_bytes()
    built = make_model(model)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    engine, seconds = DeepSpeedEngine(built, config_of(stage), world, 1), []
    for step in range(-2, request["steps"]):
        world.barrier()
        started = time.perf_counter()
        train_step(engine, objective, batches, world, seed=0, epoch=0, step=step + 2)
        if step >= 0:
            seconds.append(time.perf_counter() - started)
    found = {"optimizer": engine.optimizer_bytes(), "peak": peak_rss_bytes() - before, "parameters": parameters}
    print(json.dumps(found | {"step_s": statistics.median(seconds)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000, help="per worker and step")
    parser.add_argument("--table-nodes", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=64, help="of a node's vector")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the result")
    args = parser.parse_args()
    table = {"node_embedding": args.width, "num_nodes": args.table_nodes}
    students = {"small": {"layers": 3, "hidden": 128}, "table": {"layers": 2, "hidden": 32, **table}}
    results: dict[str, dict[str, Any]] = {}
    for name, model in students.items():
        for stage in range(4):
            request = {"model": model, "stage": stage, "nodes": args.nodes, "steps": args.steps}
            ranks = run_ranks(__file__, args.workers, request)
            worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            results.setdefault(name, {})[f"zero{stage}"] = worst
            print(
                f"{name:6s} ZeRO {stage}  {worst['parameters']:>12,} parameters  "
                f"optimizer {worst['optimizer'] / 2**20:8.2f} MiB  peak {worst['peak'] / 2**20:8.1f} MiB  "
                f"step {1000 * worst['step_s']:8.1f} ms",
                flush=True,
            )
    if args.save:
        save("zero-gloo2", {"settings": vars(args), "environment": describe(), "students": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        torch.set_num_threads(1)
        one_rank(json.loads(sys.argv[2]))
    else:
        main()
