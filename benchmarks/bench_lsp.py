"""LSP forward and backward: this package against gathering both ends of every edge.

Both sides compute the same loss of the same student against the same stored teacher scores, and are
timed in turns in one process; peak memory is taken in a process of its own for each. `ours` is
compiled (the first pass, which compiles, is not timed), `ours_chunks` does without a compiler and
`ours_unsorted` sorts the edges every time. The gather
formulation is what one writes with PyTorch Geometric: `z[source] - z[target]` and
`torch_geometric.utils.softmax`.

    python benchmarks/bench_lsp.py                                  # 100,000 nodes, 20 neighbours, 256 channels
    python benchmarks/bench_lsp.py --nodes 5000 --repeats 2         # a minute's look
    python benchmarks/bench_lsp.py --device cuda --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import copy_bytes_per_s, describe
from torch import Tensor
from torch_geometric.utils import softmax

from gkd_dist.losses import Neighbours, edge_scores, lsp_loss

SIGMA = 256.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # the gather formulation computes in the dtype of the embeddings
ROOT = Path(__file__).resolve().parent.parent
SIDES = ("gather", "ours", "ours_chunks", "ours_unsorted")


def gather_lsp(z: Tensor, edge_index: Tensor, teacher_scores: Tensor) -> Tensor:
    """The gather formulation: rbf, softmax of kernel values, KL(student || teacher), mean over nodes."""
    source, target = edge_index

    def structure(scores: Tensor) -> Tensor:
        kernel = torch.exp(-scores / (2 * SIGMA))
        return softmax(kernel, target, num_nodes=z.size(0))

    student = structure((z[source] - z[target]).square().sum(1))
    teacher = structure(teacher_scores)
    return (student * (student / teacher).log()).sum() / target.unique().numel()


def make_case(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Student [n, d], edges [2, E] without self-loops in random order, teacher scores [E]."""
    generator = torch.Generator().manual_seed(0)
    num_edges = args.nodes * args.degree
    source = torch.randint(0, args.nodes, (num_edges,), generator=generator)
    target = (source + torch.randint(1, args.nodes, (num_edges,), generator=generator)) % args.nodes
    edge_index = torch.stack([source, target])
    if args.undirected:
        half = edge_index[:, : num_edges // 2]
        edge_index = torch.cat([half, half.flip(0)], 1)
    teacher = torch.randn(args.nodes, 64, generator=generator)
    teacher_scores = edge_scores(teacher, edge_index) * 4  # of the size of the student's
    z = torch.randn(args.nodes, args.channels, generator=generator)
    return z.to(args.device, DTYPES[args.dtype]), edge_index.to(args.device), teacher_scores.to(args.device)


def make_side(side: str, edge_index: Tensor, teacher_scores: Tensor, num_nodes: int) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the student's embeddings alone."""
    if side == "gather":
        return lambda z: gather_lsp(z, edge_index, teacher_scores)
    edges = edge_index if side == "ours_unsorted" else Neighbours.of_edges(edge_index, num_nodes)
    compiled = side != "ours_chunks"
    return lambda z: lsp_loss(z, edges, teacher_scores=teacher_scores, sigma=SIGMA, compiled=compiled)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run_once(loss: Callable[[Tensor], Tensor], z: Tensor, device: str) -> dict[str, Any]:
    """One forward and backward pass: seconds of each, loss and gradient."""
    z = z.detach().requires_grad_()
    synchronise(device)
    start = time.perf_counter()
    value = loss(z)
    synchronise(device)
    middle = time.perf_counter()
    (grad,) = torch.autograd.grad(value, z)
    synchronise(device)
    return {"forward_s": middle - start, "backward_s": time.perf_counter() - middle, "loss": value.item(), "grad": grad}


def time_sides(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Best of ``repeats`` for every side, in turns, after one warm-up; checks that they agree."""
    z, edge_index, teacher_scores = make_case(args)
    losses = {side: make_side(side, edge_index, teacher_scores, args.nodes) for side in SIDES}
    grads = {side: run_once(loss, z, args.device) for side, loss in losses.items()}
    for side in SIDES[1:]:
        gap = (grads[side]["grad"] - grads["gather"]["grad"]).norm() / grads["gather"]["grad"].norm()
        if not gap < TOLERANCE[args.dtype]:
            raise SystemExit(f"gradients of {side} and gather differ by {gap:.2e}")
    result = {side: {"loss": grads[side]["loss"]} for side in SIDES}
    del grads
    for _ in range(args.repeats):
        for side, loss in losses.items():
            once = run_once(loss, z, args.device)
            total = once["forward_s"] + once["backward_s"]
            if total < result[side].get("total_s", float("inf")):
                result[side] |= {"forward_s": once["forward_s"], "backward_s": once["backward_s"], "total_s": total}
    return result


# --- memory, in a process of its own ---------------------------------------------------------------


def status_bytes(key: str) -> int:
    """A kB field of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_extra_bytes(side: str, args: argparse.Namespace) -> int:
    """Largest memory during one forward and backward pass above that of its inputs."""
    z, edge_index, teacher_scores = make_case(args)
    loss = make_side(side, edge_index, teacher_scores, args.nodes)
    # A pass over few nodes first, so that libraries have their buffers.
    few = torch.stack([torch.arange(63), torch.arange(1, 64)]).to(args.device)
    small = make_side(side, few, teacher_scores[:63], 64)
    run_once(small, z[:64], args.device)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(loss, z, args.device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_bytes("VmRSS")
    run_once(loss, z, args.device)
    return status_bytes("VmHWM") - before


def memory_of_sides(argv: list[str]) -> dict[str, int]:
    """`peak_extra_bytes` of every side, each in a fresh process."""
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, *argv, "--memory-of", side]
        peaks[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return peaks


def useful_bytes(args: argparse.Namespace) -> float:
    """What no formulation without [E, d] tensors can do without: a row per edge forward, one per entry of the Laplacian
    backward (in fp32), the gradient, and one pass of a dozen numbers per edge."""
    edges, size = args.nodes * args.degree, DTYPES[args.dtype].itemsize
    entries = edges if args.undirected else 2 * edges
    return args.channels * (size * (edges + args.nodes) + 4 * entries + (4 + size) * args.nodes) + 12 * 4 * edges


# --- report --------------------------------------------------------------------------------------------


def print_table(sides: dict[str, dict[str, float]], edge_bytes: int) -> None:
    heads = ("forward s", "backward s", "total s", "peak MiB", "of E·d·4 B", "faster")
    print(" " * 16 + "".join(f"{head:>12s}" for head in heads))
    for side, row in sides.items():
        print(
            f"{side:16s}{row['forward_s']:12.3f}{row['backward_s']:12.3f}{row['total_s']:12.3f}"
            f"{row['peak_extra_bytes'] / 2**20:12.0f}{row['peak_extra_bytes'] / edge_bytes:12.2f}"
            f"{sides['gather']['total_s'] / row['total_s']:11.1f}x"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--degree", type=int, default=20, help="average number of in-neighbours")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--undirected", action="store_true", help="every edge in both directions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the student's embeddings")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/lsp-<device>-<size>.json")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_extra_bytes(args.memory_of, args))
        return
    sides = time_sides(args)
    for side, peak in memory_of_sides(argv).items():
        sides[side]["peak_extra_bytes"] = peak
    edge_bytes = args.nodes * args.degree * args.channels * 4
    print_table(sides, edge_bytes)
    keys = ("nodes", "degree", "channels", "undirected", "repeats", "device", "dtype")
    case = {key: getattr(args, key) for key in keys}
    speed, copied = useful_bytes(args) / sides["ours"]["total_s"], copy_bytes_per_s(args.device)
    ratios = {
        "times_faster": sides["gather"]["total_s"] / sides["ours"]["total_s"],
        "memory_share": sides["ours"]["peak_extra_bytes"] / sides["gather"]["peak_extra_bytes"],
        "memory_of_edge_matrix": sides["ours"]["peak_extra_bytes"] / edge_bytes,
        "bytes_per_s_of_copy": speed / copied,
    }
    shape = f"n{args.nodes}-k{args.degree}-d{args.channels}{'-undirected' if args.undirected else ''}"
    shape += "" if args.dtype == "fp32" else f"-{args.dtype}"
    out = args.out or ROOT / "benchmarks" / "results" / f"lsp-{args.device}-{shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "case": case,
        "sides": sides,
        "bytes_per_s": speed,
        "copy_bytes_per_s": copied,
        "ratios": ratios,
        "environment": {**describe(), "threads": torch.get_num_threads()},
    }
    out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
