"""Weights that do not fit a model: what differs is named, and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gkd_dist.config import ModelConfig
from gkd_dist.errors import ModelError
from gkd_dist.models.build import build_model
from gkd_dist.models.fit import extra_prefix, load_weights


def model_of(kind: str = "gcn", **options: object) -> nn.Module:
    config = ModelConfig.model_validate({"kind": kind, "hidden": 4, "norm": "none", **options})
    return build_model(config, 3, 2)


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    """The sentence; the model must be as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, state, "here")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_weights_that_fit_are_loaded() -> None:
    theirs, ours = model_of(), model_of()
    load_weights(ours, theirs.state_dict(), "here")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_names_and_shapes_of_another_kind() -> None:
    assert refusal(model_of("sage"), model_of("gcn").state_dict()) == (
        "the weights at here do not fit the model: "
        "6 missing (convs.0.lin_l.bias [4], convs.0.lin_l.weight [4, 3], convs.0.lin_r.weight [4, 3], and 3 more), "
        "4 unknown (convs.0.bias [4], convs.0.lin.weight [4, 3], convs.1.bias [2], and 1 more); "
        "correct model kind, layers, norm or args to what was trained"
    )


def test_every_other_shape_is_listed_with_what_is_needed() -> None:
    assert refusal(model_of(), model_of(hidden=5).state_dict()) == (
        "the weights at here do not fit the model: "
        "3 of another shape (convs.0.bias [5], needed [4], convs.0.lin.weight [5, 3], needed [4, 3], "
        "convs.1.lin.weight [2, 5], needed [2, 4]); "
        "correct the model's hidden, heads and layers, or use data of the same width"
    )


@pytest.mark.parametrize("prefix", ["model.", "module.", "net.encoder."])
def test_a_prefix_of_the_checkpoint_is_recognised(prefix: str) -> None:
    state = prefixed(prefix, model_of().state_dict()) | {"criterion.weight": torch.ones(2)}
    assert refusal(model_of(), state).endswith(
        f"its names begin with {prefix!r}: save the state_dict of that inner module, or remove the prefix"
    )


def test_a_prefix_of_the_model_is_recognised() -> None:
    inner = model_of()
    assert refusal(nn.ModuleDict({"net": inner}), inner.state_dict()).endswith(
        "names of the model begin with 'net.': save the state_dict of the outer module, or add the prefix"
    )


def test_a_name_that_ends_alike_is_no_prefix() -> None:
    assert extra_prefix(["lin.weight", "lin.bias", "out.bias"], ["old.lin.weight", "a", "b"]) == ""
    assert extra_prefix([], ["a"]) == ""


def test_an_empty_checkpoint_lists_what_is_missing() -> None:
    assert "4 missing (convs.0.bias [4]" in refusal(model_of(), {})
