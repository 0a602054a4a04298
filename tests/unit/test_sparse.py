"""Sparse products, segment sums and segment softmax against dense and per-segment arithmetic.

The example used throughout, row = target, column = source::

        0  1  2
    0 [ .  a  b ]
    1 [ c  .  . ]
    2 [ .  .  . ]
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist import sparse
from gkd_dist.sparse import CsrPattern, segment_log_softmax, segment_max, segment_sum, spmm


@pytest.fixture
def pattern() -> CsrPattern:
    return CsrPattern.from_csr(torch.tensor([0, 2, 3, 3]), torch.tensor([1, 2, 0]))


def dense(pattern: CsrPattern, values: torch.Tensor) -> torch.Tensor:
    matrix = torch.zeros(pattern.num_rows, pattern.num_rows, dtype=values.dtype)
    return matrix.index_put((pattern.rows(), pattern.indices), values, accumulate=True)


def random_pattern(num_nodes: int, num_edges: int, seed: int) -> CsrPattern:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, num_nodes * num_nodes, (num_edges,), generator=generator).sort().values
    counts = torch.bincount(keys // num_nodes, minlength=num_nodes)
    return CsrPattern.from_csr(sparse.indptr_from_counts(counts), keys % num_nodes)


# --- structure -------------------------------------------------------------------------------


def test_transpose_of_the_example(pattern: CsrPattern) -> None:
    assert pattern.rows().tolist() == [0, 0, 1]
    assert pattern.t_indptr.tolist() == [0, 1, 2, 3]
    assert pattern.t_indices.tolist() == [1, 0, 0]
    assert pattern.t_perm.tolist() == [2, 0, 1]


def test_row_index_skips_empty_rows() -> None:
    assert sparse.row_index(torch.tensor([0, 0, 2, 2, 3, 3])).tolist() == [1, 1, 3]
    assert sparse.row_index(torch.tensor([0])).tolist() == []


def test_select_drops_non_zeros_from_both_forms(pattern: CsrPattern) -> None:
    kept = pattern.select(torch.tensor([False, True, True]))
    assert kept.indptr.tolist() == [0, 1, 2, 2]
    assert kept.indices.tolist() == [2, 0]
    assert kept.t_indptr.tolist() == [0, 1, 1, 2]
    assert kept.t_indices.tolist() == [1, 0]
    assert kept.t_perm.tolist() == [1, 0]


@given(st.integers(1, 8), st.integers(0, 30), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_select_equals_building_anew(num_nodes: int, num_edges: int, seed: int) -> None:
    pattern = random_pattern(num_nodes, num_edges, seed)
    keep = torch.rand(num_edges, generator=torch.Generator().manual_seed(seed)) < 0.6
    kept = pattern.select(keep)
    counts = torch.bincount(pattern.rows()[keep], minlength=num_nodes)
    anew = CsrPattern.from_csr(sparse.indptr_from_counts(counts), pattern.indices[keep])
    for name in ("indptr", "indices", "t_indptr", "t_indices", "t_perm"):
        assert torch.equal(getattr(kept, name), getattr(anew, name)), name


def test_chunks_cover_everything_once() -> None:
    assert sparse.chunks(10, 3, num_values=12) == [(0, 4), (4, 8), (8, 10)]
    assert sparse.chunks(2, 1000, num_values=12) == [(0, 1), (1, 2)]  # a row is never split
    assert sparse.chunks(0, 3) == []


# --- products --------------------------------------------------------------------------------


def test_spmm_of_the_example(pattern: CsrPattern) -> None:
    out = spmm(pattern, torch.tensor([2.0, 3.0, 5.0]), torch.tensor([[1.0], [10.0], [100.0]]))
    assert out.tolist() == [[320.0], [5.0], [0.0]]


def test_spmm_has_exact_gradients(pattern: CsrPattern) -> None:
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, f: spmm(pattern, v, f), (values, factor))


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_products_equal_dense_ones(num_nodes: int, num_edges: int, width: int, seed: int) -> None:
    pattern = random_pattern(num_nodes, num_edges, seed)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_edges, dtype=torch.float64, generator=generator)
    left, right = torch.randn(2, num_nodes, width, dtype=torch.float64, generator=generator)
    matrix = dense(pattern, values)
    torch.testing.assert_close(spmm(pattern, values, right), matrix @ right)
    torch.testing.assert_close(sparse.symmetric_product(pattern, values, right), (matrix + matrix.T) @ right)
    expected = (left @ right.T)[pattern.rows(), pattern.indices]
    torch.testing.assert_close(sparse.sddmm(pattern, left, right), expected)


def test_symmetric_pattern_has_its_entries_once() -> None:
    # The path 0 - 1 - 2 in both directions, with values that are not symmetric.
    pattern = CsrPattern.from_csr(torch.tensor([0, 1, 3, 4]), torch.tensor([1, 0, 2, 1]))
    values, factor = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.eye(3)
    out = sparse.symmetric_product(pattern, values, factor)
    assert out.tolist() == [[0.0, 3.0, 0.0], [3.0, 0.0, 12.0], [0.0, 12.0, 0.0]]
    assert pattern.symmetric.indices.tolist() == [1, 0, 2, 1]
    assert pattern.laplacian.indices.tolist() == [0, 1, 1, 0, 2, 2, 1]
    out = sparse.laplacian_product(pattern, values, factor)
    assert out.tolist() == [[3.0, -3.0, 0.0], [-3.0, 15.0, -12.0], [0.0, -12.0, 12.0]]


def test_other_patterns_have_two_entries_side_by_side(pattern: CsrPattern) -> None:
    both = pattern.laplacian
    assert both.indptr.tolist() == [0, 4, 7, 9]
    assert both.indices.tolist() == [0, 1, 2, 1, 1, 0, 0, 2, 0]
    assert both.first.tolist() == [3, 0, 1, 2, 3, 2, 0, 3, 1]  # 3: the diagonal
    assert both.spread(torch.tensor([2.0, 3.0, 5.0])).tolist() == [0, 2, 3, 5, 0, 5, 2, 0, 3]


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 40), st.integers(0, 1000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_products_in_fp32_equal_those_in_fp64(
    num_nodes: int, num_edges: int, width: int, seed: int, undirected: bool
) -> None:
    pattern = random_pattern(num_nodes, num_edges, seed)
    if undirected:
        keys = torch.cat([pattern.rows() * num_nodes + pattern.indices, pattern.indices * num_nodes + pattern.rows()])
        keys = keys.unique()
        counts = torch.bincount(keys // num_nodes, minlength=num_nodes)
        pattern = CsrPattern.from_csr(sparse.indptr_from_counts(counts), keys % num_nodes)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(pattern.nnz, generator=generator)
    right = torch.randn(num_nodes, width, generator=generator)
    for product in (spmm, sparse.symmetric_product, sparse.laplacian_product):
        out = product(pattern, values, right)
        assert out.dtype == torch.float32
        expected = product(pattern, values.double(), right.double())
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)
    matrix = dense(pattern, values.double())
    laplacian = (matrix + matrix.T).sum(1).diag() - matrix - matrix.T
    torch.testing.assert_close(expected, laplacian @ right.double())


def test_a_row_is_summed_alike_in_any_company_and_by_any_number_of_threads() -> None:
    pattern = random_pattern(500, 20_000, 1)
    values, right = torch.randn(20_000), torch.randn(500, 48)
    whole = spmm(pattern, values, right)
    cut = int(pattern.indptr[123])
    head = CsrPattern.forward_only(pattern.indptr[:124], pattern.indices[:cut])
    assert torch.equal(spmm(head, values[:cut], right), whole[:123])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(spmm(pattern, values, right), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    # 4,096 ones: a running sum in half precision would stop growing long before.
    pattern = CsrPattern.from_csr(torch.tensor([0, 4096] + [4096] * 4095), torch.arange(4096))
    ones = torch.ones(4096, 1, dtype=dtype)
    assert spmm(pattern, torch.ones(4096), ones)[0].item() == 4096
    assert spmm(pattern, torch.ones(4096), ones).dtype == dtype
    assert sparse.sddmm(pattern, ones, ones).dtype == torch.float32


# --- segments --------------------------------------------------------------------------------


def test_segment_sum_and_max_of_an_empty_segment_are_zero() -> None:
    indptr = torch.tensor([0, 2, 2, 3])
    assert segment_sum(torch.tensor([1.0, 2.0, 4.0]), indptr).tolist() == [3.0, 0.0, 4.0]
    assert segment_max(torch.tensor([-1.0, -2.0, -4.0]), indptr).tolist() == [-1.0, 0.0, -4.0]
    assert segment_sum(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0]
    assert segment_max(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0]


def test_segment_sum_has_exact_gradients() -> None:
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, torch.tensor([0, 2, 2, 5])), (values,))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_segment_log_softmax_is_log_softmax_of_each_segment(lengths: list[int], seed: int) -> None:
    values = 10 * torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values.requires_grad_()
    indptr = sparse.indptr_from_counts(torch.tensor(lengths))
    out = segment_log_softmax(values, indptr)
    expected = torch.cat([part.log_softmax(0) for part in values.split(lengths)])
    torch.testing.assert_close(out, expected)
    weight = torch.arange(1.0, sum(lengths) + 1, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), values), torch.autograd.grad((expected * weight).sum(), values)
    )


def test_segment_log_softmax_is_stable_and_fp32() -> None:
    values = torch.tensor([1e30, -1e30, 3e38, 3e38, -7.0])
    out = segment_log_softmax(values, torch.tensor([0, 2, 4, 5]))
    torch.testing.assert_close(out, torch.tensor([0.0, -2e30, -0.6931472, -0.6931472, 0.0]))
    assert segment_log_softmax(torch.zeros(2, dtype=torch.float16), torch.tensor([0, 2])).dtype == torch.float32
