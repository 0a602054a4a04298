"""Training of teacher and student, and inference between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gkd_dist.config.base import (
    Integer,
    NonNegative,
    NonNegativeFloat,
    NotBool,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from gkd_dist.config.deepspeed import check_deepspeed
from gkd_dist.config.models import ModelConfig


class LrSchedule(Section):
    """Learning-rate factor as a pure function of the step."""

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup: NonNegative = Field(0, description="steps of linear warm-up")
    final: Annotated[float, Field(ge=0, le=1), NotBool] = Field(0.0, description="factor at the last step")


AllOr = Positive | Literal["all"]
Neighbours = Positive | Annotated[Literal[-1], NotBool]


class CacheConfig(Section):
    """Copies of what is read from a store, on a disk of each machine and shared by its processes."""

    folder: str | None = Field(
        "auto",
        description="absolute path on a local disk; auto: in the temporary folder of the machine where the store is an "
        "object store, else none; null: no cache",
    )
    budget_bytes: Positive = Field(32 << 30, description="kept in the folder, the least recently used going first")

    @field_validator("folder")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value is not None and value != "auto" and not value.startswith("/"):
            raise ValueError(
                f"a cache is a folder on a disk of each machine (got {value!r}); use an absolute path, auto or null"
            )
        return value


class TrainConfig(Section):
    """What teacher and student training share."""

    epochs: Positive = 200
    lr: PositiveFloat = 0.01
    weight_decay: NonNegativeFloat = 5.0e-4
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: Probability = Field(0.9, description="of sgd")
    grad_clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    lr_schedule: LrSchedule = LrSchedule()
    patience: NonNegative = Field(50, description="evaluations without a better validation metric; 0: never stop early")
    eval_every: Positive = Field(1, description="epochs between validations")
    units_per_step: AllOr = Field("all", description="units per optimizer step, total over all ranks")
    parts_per_unit: AllOr = Field(1, description="parts merged into one training subgraph")
    shuffle: bool = Field(True, description="new order of the units in every epoch")
    threads: Positive = Field(1, description="torch threads of each worker")
    prefetch_bytes: Positive = Field(1 << 30, description="units read ahead, per worker")
    resident_bytes: NonNegative = Field(2 << 30, description="decoded units kept in memory, per worker")
    cache: CacheConfig = CacheConfig()
    data_timeout_s: PositiveFloat = Field(
        240.0,
        description="bound of the wait for a step's units; at most 0.8 collective_timeout_s: peers still listen",
    )
    checkpoint_every: Positive = Field(20, description="optimizer steps between checkpoints")
    keep: Positive = Field(2, description="checkpoints kept beside the best")
    log_every: Positive = Field(1, description="optimizer steps between TensorBoard points")
    checkpoint_layers: bool = Field(False, description="compute layers again in backward, to keep their inputs alone")

    @property
    def reading_timeout_s(self) -> float:
        """What the units of a step may take."""
        return self.data_timeout_s


class TeacherTrainConfig(TrainConfig):
    """Training of the teacher: one process, the whole graph as one unit unless told otherwise."""

    parts_per_unit: AllOr = "all"
    threads: Positive = Field(2, description="torch threads")


class TeacherConfig(Section):
    """The large model: trained here, or read from a checkpoint."""

    name: str = Field("teacher", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    model: ModelConfig
    checkpoint: str | None = Field(None, description="URL of safetensors or a state_dict; null: trained by `gkd teach`")
    features: str | None = Field(None, description="which of graph.features it reads; null: the graph's own x")
    train: TeacherTrainConfig = TeacherTrainConfig()
    seed: Integer | None = Field(None, description="of its training; null: the seed of the run")


class InferConfig(Section):
    """Exact teacher inference by Ray actors (``num_actors: 0``: in this process, without Ray)."""

    num_actors: NonNegative = 2
    gpus_per_actor: NonNegativeFloat = 0
    cpus_per_actor: NonNegativeFloat = 1
    memory_per_actor: Positive | None = Field(None, description="bytes of memory that Ray reserves for each actor")
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="other Ray resources that each actor takes, e.g. {highmem: 1}"
    )
    threads: Positive = Field(1, description="torch threads of each actor")
    window: Positive = Field(2, description="tasks in flight per actor")
    tile_edges: Positive = Field(
        2_000_000, description="in-edges that one computation covers at most; changes the last bits of results"
    )
    taps: tuple[str, ...] = Field((), description="modules of the teacher whose output is stored, by dotted path")
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="of stored logits, embeddings and scores")
    logits: AllOr = Field("all", description="stored of each node: all, or the k largest with the weight of the rest")
    scores: Literal["auto", "scores", "embeddings"] = Field("auto", description="what LSP reads; auto: the smaller")
    scores_dtype: Literal["fp32", "fp16", "bf16", "uint8"] | None = Field(
        None, description="of stored scores; null: dtype; uint8: affine per target node"
    )
    max_kl: NonNegativeFloat | None = Field(
        None, description="largest KL(teacher || stored teacher) that scores may allow; null: any"
    )
    max_restarts: NonNegative = 3
    max_task_retries: NonNegative = 2

    def exact(self) -> InferConfig:
        """The same actors, everything stored as it was computed."""
        return self.model_copy(update={"dtype": "fp32", "logits": "all", "scores_dtype": None, "max_kl": None})


class StudentConfig(Section):
    """The compact model."""

    model: ModelConfig
    alone: bool = Field(True, description="also train it without a teacher, for the table")
    features: str | None = Field(None, description="which of graph.features it reads; null: the graph's own x")


class DistillConfig(TrainConfig):
    """Training of the student on many workers."""

    launcher: Literal["ray", "torchrun", "deepspeed", "inline"] = "ray"
    num_workers: Positive | tuple[Positive, Positive] = Field(
        2, description="processes that train together; [min, max]: as many as the Ray cluster has room for"
    )
    resize_every_s: PositiveFloat = Field(60.0, description="pause between looks for room for more, of [min, max]")
    gpus_per_worker: NonNegative = 0
    cpus_per_worker: NonNegativeFloat = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    units_per_step: AllOr = 2
    fan_out: tuple[Neighbours, ...] | None = Field(
        None,
        description="neighbours of each node that a layer looks at in training, from the last layer to the first as "
        "in PyG's loaders; -1: all; null: all in every layer",
    )
    halo: Literal["hops", "exchange"] = Field(
        "hops",
        description="where halo activations come from: computed from stored hops, or exchanged between ranks",
    )
    max_failures: NonNegative = Field(3, description="restarts of the worker group")
    collective_timeout_s: PositiveFloat = Field(300.0, description="bound of every wait between ranks")
    peer_timeout_s: PositiveFloat = Field(25.0, description="silence after which a rank counts as dead")
    stop_timeout_s: PositiveFloat = Field(25.0, description="patience with the last checkpoint after SIGTERM, with ray")
    compile: Literal["auto"] | bool = Field(
        "auto", description="edge scores of LSP as a compiled loop; auto: where that pays; changes the last bits"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="keys handed to DeepSpeed after a check")

    @property
    def min_workers(self) -> int:
        """Fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def reading_timeout_s(self) -> float:
        """What the units of a step may take: less than the patience of peers, which wait meanwhile."""
        return min(self.data_timeout_s, 0.8 * self.collective_timeout_s)

    @field_validator("num_workers")
    @classmethod
    def _num_workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(value, int) and value[0] > value[1]:
            raise ValueError(f"[min, max] needs min <= max (got {list(value)}); swap them")
        return value

    @model_validator(mode="before")
    @classmethod
    def _whole_graph_per_step(cls, data: Any) -> Any:
        """With the parts on their ranks a step is the whole graph, which nobody has to say."""
        if isinstance(data, dict) and data.get("halo") == "exchange":
            return {"units_per_step": "all", **data}
        return data

    @model_validator(mode="after")
    def _check_exchange(self) -> DistillConfig:
        if self.halo != "exchange":
            return self
        if self.units_per_step != "all":
            raise ValueError(
                f"with halo exchange every step is the whole graph (got units_per_step {self.units_per_step}); "
                "set units_per_step=all, or halo=hops for steps of some units"
            )
        if self.parts_per_unit != 1:
            raise ValueError(
                f"with halo exchange each rank merges the parts it has (got parts_per_unit {self.parts_per_unit}); "
                "leave parts_per_unit at 1, and set num_workers for more or fewer parts per rank"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed(self) -> DistillConfig:
        check_deepspeed(self.deepspeed, self.zero_stage, self.gpus_per_worker > 0, self.grad_clip is not None)
        return self
