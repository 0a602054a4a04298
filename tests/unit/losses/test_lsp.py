"""The LSP loss: a path of three nodes by hand, a dense reference, invariances, bounds, options."""

from __future__ import annotations

import subprocess
import sys
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd_dist.errors import ConfigError, DataError, GraphError
from gkd_dist.losses import Neighbours, edge_scores, lsp_loss, union_edges

KERNELS = ("rbf", "euclidean", "laplacian", "linear", "poly", "cosine")
DIRECTIONS = ("student||teacher", "teacher||student")
PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # 0 - 1 - 2


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def random_graph(seed: int, num_nodes: int = 50, num_edges: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Student [n, 8], teacher [n, 5] and distinct directed edges, some of them self-loops."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(num_nodes * num_nodes, generator=generator)[:num_edges]
    edge_index = torch.stack([keys % num_nodes, keys // num_nodes])
    student = 0.5 * torch.randn(num_nodes, 8, dtype=torch.float64, generator=generator)
    return student, 0.5 * torch.randn(num_nodes, 5, dtype=torch.float64, generator=generator), edge_index


def dense_logits(z: Tensor, kernel: str, sigma: float, outer_softmax: bool, temperature: float) -> Tensor:
    sq, l1, dot = torch.cdist(z, z).square(), torch.cdist(z, z, p=1), z @ z.T
    plain = {"rbf": -sq / (2 * sigma), "euclidean": -sq / (2 * sigma), "laplacian": -l1 / sigma}
    length = z.norm(dim=1)
    outer = {
        "rbf": (-sq / (2 * sigma)).exp(),
        "euclidean": sq,
        "laplacian": (-l1 / sigma).exp(),
        "linear": dot,
        "poly": (dot + 0.5) ** 3,
        "cosine": dot / length[:, None] / length[None, :],
    }
    return (outer[kernel] if outer_softmax or kernel not in plain else plain[kernel]) / temperature


def dense_lsp(
    student: Tensor,
    teacher: Tensor,
    edge_index: Tensor,
    *,
    kernel: str,
    sigma: float,
    teacher_sigma: float,
    outer_softmax: bool,
    temperature: float,
    direction: str,
    reduction: str,
    self_loops: bool,
) -> Tensor:
    """The same with n x n matrices: entry (i, j) is target i, source j."""
    adjacent = torch.zeros(student.size(0), student.size(0), dtype=torch.bool)
    adjacent[edge_index[1], edge_index[0]] = True
    if not self_loops:
        adjacent.fill_diagonal_(False)
    logits_s = dense_logits(student, kernel, sigma, outer_softmax, temperature)
    logits_t = dense_logits(teacher, kernel, teacher_sigma, outer_softmax, temperature)
    total, nodes = student.new_zeros(()), 0
    for i in range(student.size(0)):
        if adjacent[i].any():
            p, q = logits_s[i][adjacent[i]].softmax(0), logits_t[i][adjacent[i]].softmax(0)
            if direction == "teacher||student":
                p, q = q, p
            total, nodes = total + (p * (p / q).log()).sum(), nodes + 1
    return total / (nodes if reduction == "nodes" else int(adjacent.sum()))


# --- by hand ---------------------------------------------------------------------------------


def test_path_by_hand() -> None:
    """Only node 1 has two neighbours; 0 and 2 have one each, contribute 0 and are counted."""
    student, teacher = column(0.0, 1.0, 3.0), column(0.0, 1.0, 2.0)
    # Squared distances from node 1: student 1 and 4, teacher 1 and 1. With sigma = 1/2 the plain
    # softmax is that of (-1, -4) against (1/2, 1/2).
    p = 1 / (1 + exp(-3))
    expected = (p * log(2 * p) + (1 - p) * log(2 * (1 - p))) / 3
    loss = lsp_loss(student, PATH, teacher_z=teacher, sigma=0.5, outer_softmax=False)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_path_by_hand_in_the_paper_s_form() -> None:
    student, teacher = column(0.0, 1.0, 3.0), column(0.0, 1.0, 2.0)
    near, far = exp(exp(-1 / 200)), exp(exp(-4 / 200))
    p = near / (near + far)
    expected = (p * log(2 * p) + (1 - p) * log(2 * (1 - p))) / 3
    assert lsp_loss(student, PATH, teacher_z=teacher).item() == pytest.approx(expected, rel=1e-9)


def test_direction_and_reduction_by_hand() -> None:
    student, teacher = column(0.0, 1.0, 3.0), column(0.0, 1.0, 2.0)
    p = 1 / (1 + exp(-3))
    reverse = 0.5 * log(0.5 / p) + 0.5 * log(0.5 / (1 - p))
    loss = lsp_loss(
        student,
        PATH,
        teacher_z=teacher,
        sigma=0.5,
        outer_softmax=False,
        direction="teacher||student",
        reduction="edges",
    )
    assert loss.item() == pytest.approx(reverse / 4, rel=1e-12)


def test_self_loops_change_the_neighbourhood_only_on_request() -> None:
    student, teacher = column(0.0, 1.0, 3.0), column(0.0, 1.0, 2.0)
    looped = torch.cat([PATH, torch.tensor([[0, 1], [0, 1]])], 1)
    without = lsp_loss(student, looped, teacher_z=teacher, sigma=1.0)
    assert without == lsp_loss(student, PATH, teacher_z=teacher, sigma=1.0)
    assert without != lsp_loss(student, looped, teacher_z=teacher, sigma=1.0, self_loops=True)


def test_nodes_without_neighbours_are_not_counted() -> None:
    student, teacher = column(0.0, 1.0, 3.0), column(0.0, 1.0, 2.0)
    alone = column(*range(10))
    more = lsp_loss(torch.cat([student, alone]), PATH, teacher_z=torch.cat([teacher, alone]))
    assert more == lsp_loss(student, PATH, teacher_z=teacher)


def test_no_edges_give_a_connected_zero() -> None:
    z = torch.randn(3, 2, requires_grad=True)
    loops = torch.tensor([[0, 1], [0, 1]])
    for sigma in (1.0, "median"):
        loss = lsp_loss(z, loops, teacher_z=z, sigma=sigma)  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == 0
    assert z.grad is not None
    assert z.grad.abs().sum() == 0


# --- dense reference --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("outer_softmax", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_the_dense_reference(kernel: str, outer_softmax: bool, direction: str) -> None:
    student, teacher, edge_index = random_graph(seed=0)
    options = {
        "kernel": kernel,
        "outer_softmax": outer_softmax,
        "direction": direction,
        "temperature": 0.7,
        "sigma": 2.0,
        "teacher_sigma": 3.0,
    }
    student.requires_grad_()
    for reduction, self_loops in (("nodes", False), ("edges", False), ("nodes", True)):
        more = {**options, "reduction": reduction, "self_loops": self_loops}
        ours = lsp_loss(student, edge_index, teacher_z=teacher, c=0.5, degree=3, **more)  # type: ignore[arg-type]
        reference = dense_lsp(student, teacher, edge_index, **more)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-13)
        (grad,), (expected,) = torch.autograd.grad(ours, student), torch.autograd.grad(reference, student)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


def test_fp32_agrees_with_the_dense_reference_to_1e_6() -> None:
    student, teacher, edge_index = random_graph(seed=1)
    options = {"kernel": "rbf", "sigma": 1.0, "outer_softmax": True, "direction": DIRECTIONS[0]}
    ours = lsp_loss(student.float(), edge_index, teacher_z=teacher.float(), **options)  # type: ignore[arg-type]
    reference = dense_lsp(
        student, teacher, edge_index, teacher_sigma=1.0, temperature=1.0, reduction="nodes", self_loops=False, **options
    )
    assert ours.dtype == torch.float32
    assert abs(ours.item() - reference.item()) < 1e-6
    assert reference.item() > 1e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str) -> None:
    student, teacher, edge_index = random_graph(seed=2, num_nodes=6, num_edges=20)
    check = lambda z: lsp_loss(z, edge_index, teacher_z=teacher, sigma=1.0, direction=direction)  # noqa: E731
    assert torch.autograd.gradcheck(check, (student.requires_grad_(),))


# --- properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_where_student_is_teacher_and_positive_otherwise(kernel: str, direction: str) -> None:
    student, teacher, edge_index = random_graph(seed=3)
    options = {"kernel": kernel, "direction": direction, "sigma": 1.0}
    assert abs(lsp_loss(student, edge_index, teacher_z=student, **options).item()) < 1e-12  # type: ignore[arg-type]
    assert lsp_loss(student, edge_index, teacher_z=teacher, **options).item() > 1e-5  # type: ignore[arg-type]


@given(st.integers(0, 500), st.sampled_from(KERNELS), st.booleans())
@settings(max_examples=30, deadline=None)
def test_renaming_nodes_and_reordering_edges_changes_nothing(seed: int, kernel: str, outer: bool) -> None:
    student, teacher, edge_index = random_graph(seed, num_nodes=20, num_edges=80)
    generator = torch.Generator().manual_seed(seed)
    new_name, order = torch.randperm(20, generator=generator), torch.randperm(80, generator=generator)
    old_name = torch.argsort(new_name)
    options = {"kernel": kernel, "outer_softmax": outer, "sigma": 1.0}
    before = lsp_loss(student, edge_index, teacher_z=teacher, **options)  # type: ignore[arg-type]
    after = lsp_loss(student[old_name], new_name[edge_index][:, order], teacher_z=teacher[old_name], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-12)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[
        0
    ]


@pytest.mark.parametrize(
    ("kernel", "rotates", "moves"),
    [
        ("rbf", True, True),
        ("euclidean", True, True),
        ("laplacian", False, True),
        ("linear", True, False),
        ("poly", True, False),
        ("cosine", True, False),
    ],
)
def test_invariance_under_rotation_and_translation(kernel: str, rotates: bool, moves: bool) -> None:
    student, teacher, edge_index = random_graph(seed=4)
    loss = lambda z: lsp_loss(z, edge_index, teacher_z=teacher, kernel=kernel, sigma=1.0).item()  # type: ignore[arg-type] # noqa: E731
    before = loss(student)
    assert (abs(loss(student @ rotation(8)) - before) < 1e-10) is rotates
    assert (abs(loss(student + 3.0) - before) < 1e-10) is moves


@given(st.integers(0, 500), st.floats(1e-3, 1e3), st.sampled_from(["rbf", "laplacian"]), st.sampled_from(DIRECTIONS))
@settings(max_examples=50, deadline=None)
def test_bound_of_kernels_between_0_and_1(seed: int, sigma: float, kernel: str, direction: str) -> None:
    student, teacher, edge_index = random_graph(seed, num_nodes=12, num_edges=60)
    loss = lsp_loss(10 * student, edge_index, teacher_z=teacher, kernel=kernel, sigma=sigma, direction=direction)  # type: ignore[arg-type]
    assert -1e-12 <= loss.item() <= 0.4745


def test_the_bound_is_reached() -> None:
    # 41 of 100 neighbours are near in one network and far in the other, the rest the other way round.
    star = torch.stack([torch.arange(1, 101), torch.zeros(100, dtype=torch.int64)])
    near_first = torch.zeros(101, 1, dtype=torch.float64)
    near_first[42:] = 1e3
    near_rest = torch.zeros(101, 1, dtype=torch.float64)
    near_rest[1:42] = 1e3
    assert 0.47 < lsp_loss(near_first, star, teacher_z=near_rest, sigma=1.0).item() <= 0.4745


def test_union_neighbourhood_of_equal_graphs_is_the_graph() -> None:
    student, teacher, edge_index = random_graph(seed=5)
    union = union_edges(edge_index, edge_index.flip(1), 50)
    assert union.size(1) == edge_index.size(1)
    whole = lsp_loss(student, edge_index, teacher_z=teacher)
    torch.testing.assert_close(lsp_loss(student, union, teacher_z=teacher), whole, rtol=1e-12, atol=0)


def test_descent_brings_the_student_s_structure_to_the_teacher_s() -> None:
    student, teacher, edge_index = random_graph(seed=6)
    neighbours = Neighbours.of_edges(edge_index, 50)
    optimizer = torch.optim.Adam([student.requires_grad_()], lr=0.02)
    losses = []
    for _ in range(100):
        loss = lsp_loss(student, neighbours, teacher_z=teacher, kernel="cosine", temperature=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


# --- stored scores, widths -----------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("self_loops", [False, True])
def test_stored_scores_equal_a_live_teacher(kernel: str, self_loops: bool) -> None:
    student, teacher, edge_index = random_graph(seed=7)
    metric = {"rbf": "sqeuclidean", "euclidean": "sqeuclidean", "laplacian": "manhattan", "cosine": "cosine"}
    scores = edge_scores(teacher, edge_index, metric.get(kernel, "dot"))  # type: ignore[arg-type]
    options = {"kernel": kernel, "self_loops": self_loops, "sigma": 1.0}
    live = lsp_loss(student, edge_index, teacher_z=teacher, **options)  # type: ignore[arg-type]
    assert lsp_loss(student, edge_index, teacher_scores=scores, **options) == live  # type: ignore[arg-type]
    sorted_once = Neighbours.of_edges(edge_index, 50, self_loops=self_loops)
    assert lsp_loss(student, sorted_once, teacher_scores=scores, **options) == live  # type: ignore[arg-type]


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, edge_index = random_graph(seed=8)
    lsp_loss(student.requires_grad_(), edge_index, teacher_z=teacher.requires_grad_(), sigma="median").backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_median_width_is_per_side_and_of_edges_that_are_no_loops() -> None:
    student, teacher = column(0.0, 1.0, 3.0), column(0.0, 2.0, 4.0)
    looped = torch.cat([PATH, torch.tensor([[0, 1, 2, 0], [0, 1, 2, 0]])], 1)
    # Squared distances of the four edges: student 1, 1, 4, 4 (lower median 1), teacher 4.
    by_median = lsp_loss(student, looped, teacher_z=teacher, sigma="median", self_loops=True)
    assert by_median == lsp_loss(student, looped, teacher_z=teacher, sigma=0.5, teacher_sigma=2.0, self_loops=True)
    mixed = lsp_loss(student, looped, teacher_z=teacher, sigma="median", teacher_sigma=7.0)
    assert mixed == lsp_loss(student, looped, teacher_z=teacher, sigma=0.5, teacher_sigma=7.0)


def test_median_width_makes_the_loss_free_of_scale() -> None:
    student, teacher, edge_index = random_graph(seed=9)
    losses = [
        lsp_loss(s * student, edge_index, teacher_z=teacher, sigma="median").item() for s in (1.0, 2.0**-8, 2.0**8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)
    assert losses[0] > 1e-3


# --- faults --------------------------------------------------------------------------------------


def test_wrong_input_is_named() -> None:
    z = torch.randn(3, 2)
    with pytest.raises(ConfigError, match=r"needs teacher_z or teacher_scores \(got neither\)"):
        lsp_loss(z, PATH)
    with pytest.raises(ConfigError, match=r"\(got both\); give exactly one"):
        lsp_loss(z, PATH, teacher_z=z, teacher_scores=torch.zeros(4))
    with pytest.raises(ConfigError, match="direction must be"):
        lsp_loss(z, PATH, teacher_z=z, direction="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reduction must be nodes or edges"):
        lsp_loss(z, PATH, teacher_z=z, reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sigma must be a positive number"):
        lsp_loss(z, PATH, teacher_z=z, sigma=0.0)
    with pytest.raises(GraphError, match=r"one score per edge of edge_index \(got \[3\] for 4 edges\)"):
        lsp_loss(z, PATH, teacher_scores=torch.zeros(3))
    with pytest.raises(GraphError, match="one score per edge"):
        lsp_loss(z, Neighbours.of_edges(PATH, 3), teacher_scores=torch.zeros(3))
    with pytest.raises(GraphError, match="edges are of 3 nodes, but the embeddings have 2 rows"):
        lsp_loss(z, PATH, teacher_z=z[:2])
    with pytest.raises(DataError, match="positive median score"):
        lsp_loss(torch.ones(3, 2), PATH, teacher_z=z, sigma="median")


def test_losses_import_neither_ray_nor_deepspeed_nor_torch_geometric() -> None:
    code = (
        "import sys, gkd_dist.losses\n"
        "heavy = {'ray', 'deepspeed', 'torch_geometric', 'fsspec'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.strip() == "[]"
