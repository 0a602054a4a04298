"""Where the graph comes from and how it is cut."""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gkd_dist.config.base import (
    Fraction,
    Integer,
    NonNegative,
    NonNegativeFloat,
    NotBool,
    Positive,
    PositiveFloat,
    Section,
)


class PygSource(Section):
    """Any data set class of ``torch_geometric.datasets`` by name."""

    kind: Literal["pyg"]
    name: str = Field(description="class name, e.g. Planetoid, Amazon, Coauthor")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the class, without root")


class ArraysSource(Section):
    """npz file, folder of npy files, or a file written by `gkd_dist.save_arrays`."""

    kind: Literal["arrays"]
    path: str = Field(description="any fsspec URL: an .npz file or a folder of .npy files")


class SyntheticSource(Section):
    """Degree-corrected planted partition with noisy features; see `gkd_dist.data.synthetic`."""

    kind: Literal["synthetic"]
    num_nodes: Positive = 20_000
    num_classes: Annotated[int, Field(ge=2), NotBool] = 10
    average_degree: PositiveFloat = 12.0
    homophily: Annotated[float, Field(ge=0, le=1), NotBool] = Field(0.30, description="P(an edge joins the same class)")
    partner: Annotated[float, Field(ge=0, le=1), NotBool] = Field(
        0.30, description="P(an edge joins the partner class)"
    )
    num_features: Positive = 32
    signal: NonNegativeFloat = Field(2.0, description="length of a class centre")
    noise: NonNegativeFloat = Field(1.0, description="standard deviation of the features around their centre")
    degree_exponent: PositiveFloat = Field(2.5, description="Pareto exponent of the degree factors")
    max_degree_factor: Annotated[float, Field(ge=1), NotBool] = 10.0
    multilabel: bool = Field(False, description="binary labels per class instead of one class per node")
    seed: Integer | None = Field(None, description="null: the seed of the run")

    @model_validator(mode="after")
    def _check(self) -> SyntheticSource:
        if self.homophily + self.partner > 1:
            raise ValueError(f"homophily + partner must be <= 1 (got {self.homophily + self.partner:g})")
        return self


Source = Annotated[PygSource | ArraysSource | SyntheticSource, Field(discriminator="kind")]


class PerClassSplit(Section):
    """``train`` and ``val`` nodes of each class drawn by seed, the rest for test."""

    kind: Literal["per_class"]
    train: Positive = 20
    val: Positive = 30
    seed: Integer | None = Field(None, description="null: the seed of the run")


class RandomSplit(Section):
    """Fractions of all labelled nodes drawn by seed, the rest for test."""

    kind: Literal["random"]
    train: Fraction = 0.6
    val: Fraction = 0.2
    seed: Integer | None = Field(None, description="null: the seed of the run")

    @model_validator(mode="after")
    def _check(self) -> RandomSplit:
        if self.train + self.val >= 1:
            raise ValueError(f"train + val must be < 1 (got {self.train + self.val:g})")
        return self


Split = Annotated[PerClassSplit | RandomSplit, Field(discriminator="kind")]


_NAME = frozenset(string.ascii_letters + string.digits + "-_")
EdgeAttr = Literal["auto", "keep", "drop"]


class GraphConfig(Section):
    """Where the graph comes from."""

    source: Source
    split: Split | None = Field(None, description="null: the split of the data set")
    split_index: NonNegative = Field(0, description="which split, where a data set has several")
    normalize_features: bool = Field(False, description="scale each feature row to sum 1")
    undirected: bool = Field(False, description="add the reverse of every edge")
    keep_multi: bool = Field(False, description="keep duplicate edges instead of coalescing them")
    edge_attr: EdgeAttr = Field(
        "auto",
        description="edge attributes; auto: one number per edge of a pyg source is its weight, all else is kept",
    )
    features: dict[str, str] = Field(
        default_factory=dict,
        description="further node features by name, each the URL of an .npy or .npz file [num_nodes, f]",
    )

    @field_validator("features")
    @classmethod
    def _features(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name or not set(name) <= _NAME:  # no dot: it is part of the name of stored tensors
                raise ValueError(f"names are letters, digits, - and _ (got {name!r}); rename it")
        return value


class PartitionConfig(Section):
    """How the graph is cut."""

    method: Literal["metis", "random", "components"] = "metis"
    num_parts: Positive = 4
    halo_hops: Positive | Literal["auto"] = Field("auto", description="auto: what exactness needs")
    seed: Integer | None = Field(None, description="null: the seed of the run")
