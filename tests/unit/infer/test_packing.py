"""From tensors to what is stored of them: extremes, and what is never stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infer_worlds import World
from torch import Tensor

from gkd_dist import layout
from gkd_dist.config import InferConfig, KdLoss, LabelLoss, LspLoss
from gkd_dist.errors import ModelError, ShardError
from gkd_dist.infer.packing import Packing, pack_knowledge, part_errors, worst
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.losses.bounds import ScoreError
from gkd_dist.shards.quantise import unpack_float, unpack_rows

NAME = "scores.2.dot"
DTYPES = ["fp32", "fp16", "bf16", "uint8"]
F32_MAX = torch.finfo(torch.float32).max


def packed(scores: Tensor, indptr: Tensor, dtype: str) -> tuple[Tensor, ScoreError]:
    """``scores`` after packing and unpacking, and what the part says of them."""
    stored, meta = pack_knowledge({NAME: scores}, indptr, Packing(scores_dtype=dtype), "part 0")
    info = meta["floats"][NAME]
    errors = part_errors(meta["floats"])
    assert list(errors) == [(2, "dot")]
    if dtype == "uint8":
        return unpack_rows(stored[NAME], stored[f"{NAME}.offset"], stored[f"{NAME}.scale"], indptr), errors[2, "dot"]
    return unpack_float(stored[NAME], info), errors[2, "dot"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    st.sampled_from(DTYPES),
)
def test_no_finite_score_becomes_infinite_or_leaves_its_bound(values: list[float], dtype: str) -> None:
    scores = torch.tensor(values)
    indptr = torch.tensor([0, len(values) // 2, len(values)])
    back, error = packed(scores, indptr, dtype)
    assert back.isfinite().all()
    assert float((back.double() - scores.double()).abs().max()) <= error.error
    assert (error.low, error.high) == (float(scores.min()), float(scores.max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [[F32_MAX, -F32_MAX], [F32_MAX], [70_000.0, 1e-30], [2.0**-149, 0.0], []], ids=str)
def test_extremes(values: list[float], dtype: str) -> None:
    back, _ = packed(torch.tensor(values), torch.tensor([0, 0, len(values)]), dtype)
    assert back.isfinite().all()
    assert back.shape == (len(values),)


def test_bytes_refuse_what_is_not_finite() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ShardError, match="finite"):
            packed(torch.tensor([1.0, bad]), torch.tensor([0, 2]), "uint8")


def test_the_worst_of_all_parts() -> None:
    assert worst([ScoreError(0.1, -1.0, 2.0), ScoreError(0.3, 0.0, 1.0)]) == ScoreError(0.3, -1.0, 2.0)
    assert worst([]) == ScoreError(0.0, 0.0, 0.0)


def test_settings_and_losses_decide() -> None:
    settings = InferConfig(dtype="bf16", logits=5, max_kl=0.1)
    losses = (LabelLoss(kind="label"), KdLoss(kind="kd", temperature=4), KdLoss(kind="kd"), LspLoss(kind="lsp"))
    packing = Packing.of(settings, losses, 3)
    assert (packing.dtype, packing.scores_dtype, packing.max_kl) == ("bf16", "bf16", 0.1)
    assert (packing.topk_of(6), packing.topk_of(5), packing.temperatures) == (5, None, (1.0, 4.0))
    assert [reader.score for reader in packing.readers] == [(2, "sqeuclidean")]
    exact = Packing.of(settings.exact())
    assert exact == Packing("fp32", "fp32")


def test_scores_that_overflow_are_refused_with_part_and_layer(
    make_world: Callable[..., World], exact: InferConfig
) -> None:
    """Embeddings may be finite where their squared distances are not."""
    world = make_world()
    world.graph.x.mul_(1e25)
    storage, _ = world.model("mlp", norm="none")
    out = world.storage("k")
    with pytest.raises(ModelError, match=r"scores\.1\.sqeuclidean of knowledge of part \d has NaN or infinite values"):
        infer_nodes(storage, world.cut(2), out, Wants(scores={1: {"sqeuclidean"}}), exact, fingerprint="f" * 64)
    assert not out.exists(layout.MANIFEST)
