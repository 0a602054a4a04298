"""Is the quickstart's task hard enough that its table means something? Three seeds, the real command.

Runs ``gkd run configs/quickstart.yaml`` once per seed (graph, split and initial weights change with it) and checks
that the teacher beats the plain student by 8 points, that distillation helps in every seed and by 2 points on
average, and that it at least halves the LSP divergence from the teacher. Prints the table and writes JSON; fails
where a check does.

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [--config configs/quickstart.yaml] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import describe, save

ROOT = Path(__file__).parents[1]
MODELS = ("teacher", "alone", "distilled")


def run_seed(config: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """``metrics.json`` of one seed and the seconds of the whole command."""
    run = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "gkd_dist", "run", config, f"run={run}", f"seed={seed}", "--json", *overrides]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout), "command_s": time.perf_counter() - started}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation per model, paired differences, and which checks hold."""
    test = {m: [100 * r["models"][m]["accuracy"]["test"] for r in results] for m in MODELS}
    divergence = {m: [r["models"][m]["lsp_kl"] for r in results] for m in MODELS[1:]}
    over_alone = [t - a for t, a in zip(test["teacher"], test["alone"], strict=True)]
    gain = [d - a for d, a in zip(test["distilled"], test["alone"], strict=True)]
    means = {m: statistics.mean(values) for m, values in divergence.items()}
    return {
        "test_accuracy": {m: spread(values) for m, values in test.items()},
        "lsp_kl": {m: spread(values) for m, values in divergence.items()},
        "teacher_minus_alone": spread(over_alone),
        "distilled_minus_alone": spread(gain),
        "command_s": spread([r["command_s"] for r in results]),
        "checks": {
            "teacher - alone >= 8 points": min(over_alone) >= 8,
            "distilled - alone >= 2 points on average": statistics.mean(gain) >= 2,
            "distilled - alone > 0 in every seed": min(gain) > 0,
            "LSP divergence at most half": means["distilled"] <= means["alone"] / 2,
        },
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation, "values": values}


def main() -> None:
    """Runs, prints, writes, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [run_seed(args.config, seed, Path(folder), args.overrides) for seed in args.seeds]
    found = summary(results)
    for name in MODELS:
        values, kl = found["test_accuracy"][name], found["lsp_kl"].get(name)
        text = "" if kl is None else f"   LSP KL {kl['mean']:.2f}"
        print(f"{name:<10} test {values['mean']:.1f} +- {values['std']:.1f} %{text}")
    for check, holds in found["checks"].items():
        print(f"{'holds ' if holds else 'FAILS '} {check}")
    case = {"config": args.config, "seeds": args.seeds, "overrides": args.overrides}
    save("quickstart-seeds", {"case": case, "environment": describe(), **found})
    sys.exit(0 if all(found["checks"].values()) else 1)


if __name__ == "__main__":
    main()
