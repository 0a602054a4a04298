"""A whole distillation step with the LSP term against the same step without it.

Both sides run what the trainer runs: `train_step` with an engine, forward, losses, backward, update. The graph is one
unit in memory, so that reading is no part of it. Sides alternate in one process after a warm-up, which compiles.

    python benchmarks/bench_step.py                                   # GCN 3 x 128, 200,000 nodes, 4 M edges
    python benchmarks/bench_step.py --nodes 20000 --edges 400000      # a look
    python benchmarks/bench_step.py --preset ppi                      # as many nodes, edges, features as PPI
    python benchmarks/bench_step.py --preset large --device cuda --precision bf16    # 1 M nodes, 20 M edges

On CUDA the result also has the share of time in which a kernel ran, and the bytes per second that the LSP term moved
beside those of a plain copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from environment import copy_bytes_per_s, describe, save

from gkd_dist.config import DistillConfig, KdLoss, LabelLoss, Loss, LspLoss, ModelConfig
from gkd_dist.distill.engine import DeepSpeedEngine
from gkd_dist.distill.step import Engine, train_step
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.trainer import prepare_process
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.losses import edge_scores
from gkd_dist.losses.objective import Objective
from gkd_dist.models.build import build_model
from gkd_dist.world import World

PRESETS = {
    "default": {"nodes": 200_000, "edges": 4_000_000, "features": 128, "classes": 40},
    "ppi": {"nodes": 56_944, "edges": 1_612_348, "features": 50, "classes": 121},
    "large": {"nodes": 1_000_000, "edges": 20_000_000, "features": 128, "classes": 40},
}
SIDES = ("without", "with")


def make_batch(args: argparse.Namespace) -> Batch:
    """An undirected random graph as one unit, with what a teacher of as many layers would know."""
    random = torch.Generator().manual_seed(0)
    source = torch.randint(args.nodes, (args.edges // 2,), generator=random)
    target = (source + torch.randint(1, args.nodes, (args.edges // 2,), generator=random)) % args.nodes
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    graph = LocalGraph.from_edge_index(edges, args.nodes)
    graph.num_owned = args.nodes
    layer = args.layers - 1
    teacher = torch.randn(args.nodes, 64, generator=random)
    mask = torch.rand(args.nodes, generator=random) < 0.1
    return Batch(
        unit=0,
        graph=graph,
        x=torch.randn(args.nodes, args.features, generator=random),
        y=torch.randint(args.classes, (args.nodes,), generator=random),
        train_mask=mask,
        val_mask=~mask,
        test_mask=~mask,
        n_id=torch.arange(args.nodes),
        num_owned=args.nodes,
        teacher_logits=torch.randn(args.nodes, args.classes, generator=random),
        teacher_scores={(layer, "sqeuclidean"): edge_scores(teacher, graph.edge_index)},
    )


def make_side(side: str, args: argparse.Namespace, world: World) -> tuple[Engine, Objective]:
    """Engine and objective as the trainer would make them."""
    losses: list[Loss] = [LabelLoss(kind="label"), KdLoss(kind="kd")]
    if side == "with":
        losses.append(LspLoss(kind="lsp", sigma=64.0, outer_softmax=False))
    objective = Objective(losses, "multiclass", args.layers, args.layers, {})
    objective.compiled = args.compile == "true"
    torch.manual_seed(0)
    config = ModelConfig(kind=args.kind, hidden=args.hidden, layers=args.layers)
    model = build_model(config, args.features, args.classes)
    train = DistillConfig(lr=1e-3, precision=args.precision, zero_stage=args.zero_stage)
    if args.engine == "torch":
        return TorchEngine(model, train, world.device), objective
    return DeepSpeedEngine(model, train, world, 1), objective


def run_once(engine: Engine, objective: Objective, batch: Batch, world: World, step: int) -> float:
    """Seconds of one step."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    train_step(engine, objective, [batch], world, seed=0, epoch=0, step=step)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def kernel_seconds(run: Any) -> float:
    """Time in which the device computed during ``run``; kernels of one stream do not overlap."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def lsp_bytes(args: argparse.Namespace, directed_edges: int) -> float:
    """What the term cannot do without: a row per edge forward, one per entry of the Laplacian backward, results.

    The graph is undirected, so that the Laplacian has an entry per directed edge and one per node.
    """
    row = 4 * args.hidden  # outputs reach the losses in fp32
    return row * (directed_edges + args.nodes + directed_edges + 2 * args.nodes) + 12 * 4 * directed_edges


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times of both sides in turns."""
    world = World(device=torch.device(args.device))
    world.connect(300)
    prepare_process(args.threads)
    batch = make_batch(args).to(world.device)
    sides = {side: make_side(side, args, world) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    first = {side: run_once(*sides[side], batch, world, 0) for side in SIDES}
    for step in range(1, args.repeats + 1):
        for side in SIDES:
            times[side].append(run_once(*sides[side], batch, world, step))
    result: dict[str, Any] = {
        "sides": {
            side: {"first_s": first[side], "min_s": min(values), "median_s": statistics.median(values), "all_s": values}
            for side, values in times.items()
        }
    }
    least = {side: min(values) for side, values in times.items()}
    result["ratios"] = {"with_over_without": least["with"] / least["without"]}
    if world.device.type == "cuda":
        for side in SIDES:
            torch.cuda.reset_peak_memory_stats()
            busy = kernel_seconds(lambda side=side: run_once(*sides[side], batch, world, args.repeats + 1))
            result["sides"][side]["busy_fraction"] = min(1.0, busy / least[side])
            result["sides"][side]["peak_bytes"] = torch.cuda.max_memory_allocated()
    moved, copied = lsp_bytes(args, batch.graph.num_edges), copy_bytes_per_s(world.device)
    speed = moved / max(1e-9, least["with"] - least["without"])
    result["lsp"] = {"bytes": moved, "bytes_per_s": speed, "copy_bytes_per_s": copied, "share_of_copy": speed / copied}
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="default")
    for name in ("nodes", "edges", "features", "classes"):
        parser.add_argument(f"--{name}", type=int, help="in place of the preset's")
    parser.add_argument("--kind", default="gcn", help="gcn, sage, gat, gin or mlp")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--compile", choices=("true", "false"), default="true", help="edge scores as a compiled loop")
    parser.add_argument("--engine", choices=("deepspeed", "torch"), default="deepspeed")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="name of the result; default: from device, size and precision")
    args = parser.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    result = measure(args)
    case = {key: value for key, value in vars(args).items() if key not in ("out", "preset")}
    result |= {"case": case, "environment": {**describe(), "threads": torch.get_num_threads()}}
    for side, row in result["sides"].items():
        print(f"{side:8s} min {row['min_s']:.3f} s, median {row['median_s']:.3f} s, first {row['first_s']:.1f} s")
    print(f"with / without: {result['ratios']['with_over_without']:.2f}")
    name = f"step-{args.device}-{args.kind}-n{args.nodes}-m{args.edges}-d{args.hidden}-{args.precision}"
    save(args.out or name, result)


if __name__ == "__main__":
    main()
