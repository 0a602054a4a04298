"""From the command to train to the first finished step: two workers of Ray Train, with Ray up already.

A small run is prepared (partition, teach, infer); then its student is trained several times through the same call as
`gkd distill` makes. Times come from the workers: the student is a class of this file that writes down when its process
was created, when its module was imported (torch is, and the ranks have met), when it was built and when it first ran to
be trained; the first TensorBoard event has the time of the first step.

    python benchmarks/bench_ray_start.py --save         # three minutes
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
STAMPS = "GKD_BENCH_STAMPS"
TARGET_S = 25.0
SETTINGS = """
run: {run}
graph:
  source: {{kind: synthetic, num_nodes: 2000, num_classes: 3, average_degree: 6, num_features: 8}}
partition: {{method: random, num_parts: 4}}
teacher: {{model: {{kind: sage, hidden: 16}}, train: {{epochs: 2, threads: 1}}}}
infer: {{num_actors: 0}}
student: {{model: {{kind: "bench_ray_start:Stamped", layers: 2}}, alone: false}}
losses: [{{kind: label}}, {{kind: kd}}]
distill: {{launcher: ray, num_workers: 2, epochs: 2, patience: 0}}
"""


def stamp(what: str, at: float | None = None) -> None:
    """Writes the time down, once per process and ``what``; only workers know where to."""
    folder = os.environ.get(STAMPS)
    if folder:
        file = Path(folder) / f"{what}-{os.getpid()}"
        if not file.exists():
            file.write_text(str(at or time.time()))


if __name__ != "__main__":
    stamp("process", psutil.Process().create_time())
    stamp("imported")


class Stamped(nn.Module):
    """A linear student that says when it was built and when it ran."""

    num_layers = 2

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        stamp("built")
        self.linear = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            stamp("ran")
        out: Tensor = self.linear(x)
        return out


def first_step(run: Path) -> float:
    """Time of the first event that training wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    times = []
    for file in (run / "tensorboard" / "distilled").rglob("events*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()
        times += [e.wall_time for tag in tags["scalars"] for e in events.Scalars(tag)]
        times += [e.wall_time for tag in tags["tensors"] for e in events.Tensors(tag)]
    return min(times)


def train_once(config: Any, stamps: Path) -> dict[str, float]:
    """Seconds from the call to each mark, of the slower worker."""
    from gkd_dist import stages
    from gkd_dist.distill.job import TrainJob
    from gkd_dist.distill.placement import train_on_ray
    from gkd_dist.session import Session
    from gkd_dist.telemetry import Progress

    session = Session.open(config, Progress(interactive=False))
    stages.distill_discard(session)
    session.run.delete_tree("tensorboard")
    for file in stamps.iterdir():
        file.unlink()
    started = time.time()
    train_on_ray(TrainJob(session.run, stages.student_tasks(session), config.distill), lambda progress: None)
    ended = time.time()
    marks = {
        what: max(float(file.read_text()) for file in stamps.glob(f"{what}-*"))
        for what in ("process", "imported", "built", "ran")
    }
    marks["first step"] = first_step(Path(config.run))
    return {**{name: at - started for name, at in marks.items()}, "ended": ended - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4, help="the first is not counted")
    parser.add_argument("--save", action="store_true", help="write the result")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from environment import describe, save

    from gkd_dist import cli
    from gkd_dist.config_file import load_config

    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder, "stamps")
        stamps.mkdir()
        paths = (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for the workers, which Ray starts from here
        file = Path(folder, "config.yaml")
        file.write_text(SETTINGS.format(run=Path(folder, "run")))
        for verb in ("partition", "teach", "infer"):
            if code := cli.main([verb, str(file)]):
                raise SystemExit(code)
        os.environ[STAMPS] = str(stamps)
        import ray

        asked = time.time()
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        ray_s = time.time() - asked
        runs = [train_once(load_config(file), stamps) for _ in range(args.repeats)]
        ray.shutdown()
    marks = list(runs[0])
    middle = {mark: statistics.median(run[mark] for run in runs[1:] or runs) for mark in marks}
    print(f"Ray came up in {ray_s:.1f} s; then, median of {max(1, args.repeats - 1)}:")
    before = 0.0
    for mark in marks:
        print(f"  {mark:10s} after {middle[mark]:6.1f} s  (+{middle[mark] - before:.1f})")
        before = middle[mark]
    if args.save:
        settings = {"workers": 2, **vars(args)}
        result = {"ray_s": ray_s, "runs": runs, "median": middle, "target_s": TARGET_S}
        save("ray-start", {"settings": settings, "environment": describe(), **result})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
