"""What a run is: one frozen pydantic model, one section per stage, in the order of the flow.

``config_file.py`` turns YAML files and dotted overrides into a `Config`. Everything that can be
known without data or devices is checked here; nothing here imports torch.
"""

from __future__ import annotations

from gkd_dist.config.base import (
    Fraction,
    Integer,
    NonNegative,
    NonNegativeFloat,
    NotBool,
    Number,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Sigma,
)
from gkd_dist.config.graph import (
    ArraysSource,
    EdgeAttr,
    GraphConfig,
    PartitionConfig,
    PerClassSplit,
    PygSource,
    RandomSplit,
    Source,
    Split,
    SyntheticSource,
)
from gkd_dist.config.losses import (
    KERNEL_METRICS,
    LAYER_LOSSES,
    FitnetLoss,
    KdLoss,
    LabelLoss,
    Loss,
    LossConfig,
    LspLoss,
    Schedule,
)
from gkd_dist.config.models import BUILT_IN_MODELS, ModelConfig, resolve_layer
from gkd_dist.config.run import Config
from gkd_dist.config.stores import RayConfig, StorageConfig, Stores
from gkd_dist.config.training import (
    AllOr,
    CacheConfig,
    DistillConfig,
    InferConfig,
    LrSchedule,
    StudentConfig,
    TeacherConfig,
    TeacherTrainConfig,
    TrainConfig,
)

__all__ = [
    "BUILT_IN_MODELS",
    "KERNEL_METRICS",
    "LAYER_LOSSES",
    "AllOr",
    "ArraysSource",
    "CacheConfig",
    "Config",
    "DistillConfig",
    "EdgeAttr",
    "FitnetLoss",
    "Fraction",
    "GraphConfig",
    "InferConfig",
    "Integer",
    "KdLoss",
    "LabelLoss",
    "Loss",
    "LossConfig",
    "LrSchedule",
    "LspLoss",
    "ModelConfig",
    "NonNegative",
    "NonNegativeFloat",
    "NotBool",
    "Number",
    "PartitionConfig",
    "PerClassSplit",
    "Positive",
    "PositiveFloat",
    "Probability",
    "PygSource",
    "RandomSplit",
    "RayConfig",
    "Schedule",
    "Section",
    "Sigma",
    "Source",
    "Split",
    "StorageConfig",
    "Stores",
    "StudentConfig",
    "SyntheticSource",
    "TeacherConfig",
    "TeacherTrainConfig",
    "TrainConfig",
    "resolve_layer",
]
