"""Does training on parts, in two processes, reach what plain PyG reaches on the whole graph?

For each seed the same model is trained twice on the same split with the same hyper-parameters: by this project (METIS
parts with halo, two workers, DeepSpeed, early stopping on the validation nodes) and by a plain full-graph loop of PyG's
own ``GCNConv`` in one process. Reports the paired difference of test accuracy with its 95 % interval (Student's t)
and whether it lies inside +-1.5 points. Initial weights and dropout masks are drawn independently.

    GKD_DATA=<data sets> python benchmarks/accuracy_vs_pyg.py [--configs configs/cora.yaml ...] [--seeds 0 1 2 3 4]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import describe, save
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from gkd_dist.config import Config
from gkd_dist.config_file import load_config
from gkd_dist.data.sources import load_graph
from gkd_dist.graph import Graph

ROOT = Path(__file__).parents[1]
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LIMIT = 1.5


class PlainGCN(nn.Module):
    """The student as PyG users write it."""

    def __init__(self, config: Config, graph: Graph) -> None:
        super().__init__()
        model = config.student.model
        widths = [graph.num_features, *[model.hidden] * (model.layers - 1), graph.num_classes]
        self.convs = nn.ModuleList(GCNConv(a, b, cached=True) for a, b in pairwise(widths))
        use_norm = model.norm == "layer"
        self.norms = nn.ModuleList(nn.LayerNorm(width) if use_norm else nn.Identity() for width in widths[1:-1])
        self.dropout, self.input_dropout = model.dropout, model.input_dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits."""
        x = F.dropout(x, self.input_dropout, self.training)
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            x = F.dropout(norm(conv(x, edge_index)).relu(), self.dropout, self.training)
        out: Tensor = self.convs[-1](x, edge_index)
        return out


def train_plain(config: Config, graph: Graph, seed: int) -> float:
    """Test accuracy in percent of the epoch that is best on the validation nodes."""
    torch.manual_seed(1000 + seed)
    model, train = PlainGCN(config, graph), config.distill
    optimizer = torch.optim.Adam(model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
    best, best_state, bad = -1.0, copy.deepcopy(model.state_dict()), 0
    for _ in range(train.epochs):
        model.train()
        optimizer.zero_grad()
        logits = model(graph.x, graph.edge_index)
        F.cross_entropy(logits[graph.train_mask], graph.y[graph.train_mask]).backward()
        optimizer.step()
        value = accuracy(model, graph, graph.val_mask)
        if value > best:
            best, best_state, bad = value, copy.deepcopy(model.state_dict()), 0
        else:
            bad += 1
            if train.patience and bad >= train.patience:
                break
    model.load_state_dict(best_state)
    return accuracy(model, graph, graph.test_mask)


@torch.no_grad()
def accuracy(model: nn.Module, graph: Graph, mask: Tensor) -> float:
    """Accuracy in percent over the nodes of ``mask``."""
    model.eval()
    predicted = model(graph.x, graph.edge_index).argmax(1)
    return 100 * float((predicted[mask] == graph.y[mask]).double().mean())


def train_here(config: str, seed: int, overrides: list[str]) -> float:
    """Test accuracy in percent of the student alone, by the command that users run."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"run={folder}/run", f"seed={seed}", "teacher.train.epochs=1", "infer.num_actors=0", *overrides]
        command = [sys.executable, "-m", "gkd_dist", "run", config, *keys, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{config}, seed {seed}: exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return float(100 * json.loads(done.stdout)["models"]["alone"]["accuracy"]["test"])


def compare(path: str, seeds: list[int], overrides: list[str]) -> dict[str, Any]:
    """Both sides of one configuration."""
    ours, plain = [], []
    for seed in seeds:
        config = load_config(path, [f"seed={seed}", *overrides])
        plain.append(train_plain(config, load_graph(config.graph, seed), seed))
        ours.append(train_here(path, seed, overrides))
        print(f"{path} seed {seed}: here {ours[-1]:.2f} %, plain {plain[-1]:.2f} %", flush=True)
    differences = [a - b for a, b in zip(ours, plain, strict=True)]
    half = T_975[len(seeds)] * statistics.stdev(differences) / len(seeds) ** 0.5
    mean = statistics.mean(differences)
    return {
        "here": ours,
        "plain": plain,
        "difference": {"mean": mean, "low": mean - half, "high": mean + half},
        "inside": mean - half >= -LIMIT and mean + half <= LIMIT,
    }


def main() -> None:
    """Runs, prints, writes, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["configs/cora.yaml", "configs/computers.yaml"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    found = {path: compare(path, args.seeds, args.overrides) for path in args.configs}
    for path, result in found.items():
        d = result["difference"]
        print(f"{path}: difference {d['mean']:+.2f} points, 95 % interval [{d['low']:+.2f}, {d['high']:+.2f}]")
    save("accuracy-vs-pyg", {"environment": describe(), "seeds": args.seeds, "limit_points": LIMIT, "configs": found})
    sys.exit(0 if all(result["inside"] for result in found.values()) else 1)


if __name__ == "__main__":
    main()
