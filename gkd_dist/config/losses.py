"""Loss terms with their weights and schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gkd_dist.config.base import Integer, NonNegative, NonNegativeFloat, Number, Positive, PositiveFloat, Section, Sigma


class Schedule(Section):
    """When a loss term is on, in epochs: off before ``start`` and from ``stop``, rising over ``warmup``."""

    start: NonNegative = 0
    stop: Positive | None = None
    warmup: NonNegative = 0

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop must be after start (got start {self.start}, stop {self.stop})")
        return self

    def factor(self, epoch: int) -> float:
        """Factor of the weight in ``epoch`` (from 0)."""
        if epoch < self.start or (self.stop is not None and epoch >= self.stop):
            return 0.0
        if self.warmup and epoch - self.start < self.warmup:
            return (epoch - self.start + 1) / (self.warmup + 1)
        return 1.0


class LossConfig(Section):
    """What every loss term has."""

    weight: NonNegativeFloat = 1.0
    schedule: Schedule = Schedule()


class LabelLoss(LossConfig):
    """Cross-entropy (binary cross-entropy for multi-label targets) on training nodes."""

    kind: Literal["label"]


class KdLoss(LossConfig):
    """Soft-label distillation, scaled by T squared, mean over nodes."""

    kind: Literal["kd"]
    temperature: PositiveFloat = 1.0
    nodes: Literal["all", "train", "unlabelled"] = Field("all", description="which nodes the student imitates")
    teacher: str | None = Field(None, description="which of several teachers; null: the mean of all")


KERNEL_METRICS = {
    "rbf": "sqeuclidean",
    "euclidean": "sqeuclidean",
    "laplacian": "manhattan",
    "linear": "dot",
    "poly": "dot",
    "cosine": "cosine",
}


class LspLoss(LossConfig):
    """Local structure preserving loss (Yang et al., CVPR 2020); see `gkd_dist.losses.lsp`."""

    kind: Literal["lsp"]
    kernel: Literal["rbf", "euclidean", "laplacian", "linear", "poly", "cosine"] = "rbf"
    sigma: Sigma = 100.0
    teacher_sigma: Sigma | None = Field(None, description="null: sigma")
    c: Number = Field(0.0, description="of the polynomial kernel")
    degree: Positive = Field(2, description="of the polynomial kernel")
    temperature: PositiveFloat = Field(1.0, description="divides kernel values before the softmax")
    outer_softmax: bool = Field(True, description="true: softmax of the kernel value, as in the paper")
    direction: Literal["student||teacher", "teacher||student"] = "student||teacher"
    reduction: Literal["nodes", "edges"] = "nodes"
    self_loops: bool = False
    fan_out: Positive | None = Field(
        None, description="neighbours of each node that a training step looks at; null: all, whatever distill.fan_out"
    )
    teacher: str | None = Field(None, description="which of several teachers; null: all, the mean of their losses")
    teacher_layer: Integer = -2
    student_layer: Integer = -2

    @property
    def metric(self) -> str:
        """Metric of the raw edge score that the kernel is computed from."""
        return KERNEL_METRICS[self.kernel]


class FitnetLoss(LossConfig):
    """Hints (Romero et al., ICLR 2015): the student's layer imitates the teacher's; see `gkd_dist.losses.fitnet`."""

    kind: Literal["fitnet"]
    teacher: str | None = Field(None, description="which of several teachers; null: all, the mean of their losses")
    teacher_layer: Integer = -2
    student_layer: Integer = -2
    projection: Literal["auto", "linear", "none"] = Field(
        "auto", description="linear map from the student's width to the teacher's; auto: where they differ"
    )
    normalize: bool = Field(False, description="compare directions: rows of both sides scaled to length 1")


Loss = Annotated[LabelLoss | KdLoss | LspLoss | FitnetLoss, Field(discriminator="kind")]
LAYER_LOSSES = (LspLoss, FitnetLoss)  # those that name a layer of the teacher and one of the student
