"""Masks of a data set are taken as they are; drawn ones are disjoint, of the asked size, and fixed by the seed."""

from __future__ import annotations

import pytest
import torch
from data_graphs import masks
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.config import PerClassSplit, RandomSplit
from gkd_dist.data.labels import Labels
from gkd_dist.data.splits import draw_masks, given_masks
from gkd_dist.errors import ConfigError, GraphError


def classes(*y: int) -> Labels:
    return Labels(torch.tensor(y), max(y) + 1, "multiclass")


def per_class(train: int, val: int, seed: int | None = None) -> PerClassSplit:
    return PerClassSplit(kind="per_class", train=train, val=val, seed=seed)


# --- masks of the data set -------------------------------------------------------------------


def test_masks_are_taken_as_they_are() -> None:
    found = given_masks("g", masks([0], [1], [2, 3]), 0, 4)
    assert found["test"].tolist() == [False, False, True, True]


def test_masks_of_zeros_and_ones_become_boolean() -> None:
    numbers = {split: mask.to(torch.uint8) for split, mask in masks([0], [1], [2, 3]).items()}
    assert given_masks("g", numbers, 0, 4)["train"].dtype == torch.bool


def test_a_column_is_chosen_and_a_shared_mask_stays() -> None:
    several = masks([0], [1], [2])
    several["train"] = torch.tensor([[True, False], [False, True], [False, False], [False, False]])
    found = given_masks("g", several, 1, 4)
    assert found["train"].tolist() == [False, True, False, False]
    assert found["test"].tolist() == [False, False, True, False]


def test_a_column_that_is_not_there() -> None:
    several = {split: mask.unsqueeze(1).repeat(1, 3) for split, mask in masks([0], [1], [2]).items()}
    with pytest.raises(ConfigError, match=r"split_index is 3, but g has 3 splits; set graph.split_index to 0 \.\. 2"):
        given_masks("g", several, 3, 4)
    with pytest.raises(ConfigError, match=r"g has 1 split; set graph\.split_index to 0$"):
        given_masks("g", masks([0], [1], [2]), 1, 4)


def test_missing_masks_are_listed_with_the_next_action() -> None:
    with pytest.raises(GraphError, match=r"g: the data set has no val_mask and no test_mask; set graph\.split"):
        given_masks("g", {"train": torch.ones(4, dtype=torch.bool)}, 0, 4)


def test_a_list_of_ids_is_no_mask() -> None:
    with pytest.raises(GraphError, match=r"train_mask has shape \[2\], expected \[4\]"):
        given_masks("g", {**masks([0], [1], [2]), "train": torch.tensor([0, 3])}, 0, 4)
    with pytest.raises(GraphError, match="train_mask holds values other than 0 and 1"):
        given_masks("g", {**masks([0], [1], [2]), "train": torch.tensor([0, 3, 1, 2])}, 0, 4)


# --- drawn masks -----------------------------------------------------------------------------


def test_per_class_takes_so_many_of_each_class() -> None:
    labels = classes(0, 0, 0, 0, 1, 1, 1, -1)
    found = draw_masks("g", per_class(1, 2), labels, seed=0)
    for split, counts in (("train", [1, 1]), ("val", [2, 2]), ("test", [1])):
        assert torch.bincount(labels.y[found[split]]).tolist() == counts
    assert not any(mask[7] for mask in found.values())


def test_random_takes_fractions_of_the_labelled_nodes() -> None:
    labels = classes(*([0, 1] * 10), *([-1] * 5))
    found = draw_masks("g", RandomSplit(kind="random", train=0.5, val=0.25), labels, seed=0)
    assert [int(found[split].sum()) for split in ("train", "val", "test")] == [10, 5, 5]


def test_random_serves_binary_labels() -> None:
    labels = Labels(torch.cat([torch.ones(10, 3), torch.full((5, 3), float("nan"))]), 3, "multilabel")
    found = draw_masks("g", RandomSplit(kind="random"), labels, seed=0)
    assert [int(mask.sum()) for mask in found.values()] == [6, 2, 2]
    assert not any(mask[10:].any() for mask in found.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(8, 30), min_size=2, max_size=5), st.integers(0, 2**40))
def test_drawn_masks_are_disjoint_and_cover_the_labelled_nodes(sizes: list[int], seed: int) -> None:
    labels = classes(*(label for label, size in enumerate(sizes) for _ in range(size)))
    for split in (per_class(2, 3), RandomSplit(kind="random")):
        found = draw_masks("g", split, labels, seed)
        assert (found["train"].int() + found["val"].int() + found["test"].int() == 1).all()


def test_the_seed_decides() -> None:
    labels = classes(*([0, 1] * 50))
    draw = lambda split, seed: draw_masks("g", split, labels, seed)["train"].nonzero().flatten().tolist()  # noqa: E731
    assert draw(per_class(5, 5), 3) == draw(per_class(5, 5), 3)
    assert draw(per_class(5, 5), 3) != draw(per_class(5, 5), 4)
    assert draw(per_class(5, 5, seed=3), 4) == draw(per_class(5, 5), 3), "the seed of the split goes first"


def test_a_drawn_split_never_changes_between_releases() -> None:
    """Published numbers name a seed: whoever changes the draw breaks their comparison."""
    found = draw_masks("g", per_class(2, 2), classes(*([0, 1] * 6)), seed=0)
    assert found["train"].nonzero().flatten().tolist() == [1, 4, 7, 10]
    assert found["val"].nonzero().flatten().tolist() == [0, 6, 9, 11]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            per_class(2, 2),
            "g: class 1 has 3 labelled nodes, but graph.split takes 2 for training and 2 for validation of each class; "
            "lower graph.split.train or graph.split.val",
        ),
        (
            RandomSplit(kind="random", train=0.9, val=0.01),
            "g: graph.split leaves a split empty (6 training, 0 validation, 1 test nodes of 7 labelled ones); "
            "change graph.split.train and graph.split.val",
        ),
    ],
)
def test_too_few_nodes(split: PerClassSplit | RandomSplit, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        draw_masks("g", split, classes(0, 0, 0, 0, 1, 1, 1), seed=0)
    assert str(caught.value) == message


def test_nothing_left_for_testing() -> None:
    with pytest.raises(GraphError, match="leaves no node for testing"):
        draw_masks("g", per_class(1, 1), classes(0, 0, 1, 1), seed=0)


def test_per_class_needs_classes() -> None:
    with pytest.raises(GraphError, match="per_class needs one class per node, but the nodes have 3 binary labels"):
        draw_masks("g", per_class(1, 1), Labels(torch.ones(9, 3), 3, "multilabel"), seed=0)
