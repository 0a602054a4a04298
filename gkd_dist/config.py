"""What a run is: one frozen pydantic model, one section per stage, in the order of the flow.

``config_file.py`` turns YAML files and dotted overrides into a `Config`. Everything that can be
known without data or devices is checked here; nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

# --- building blocks -------------------------------------------------------------------------


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _no_bool(value: Any) -> Any:
    """Stops ``epochs: true`` from meaning 1, as it does in Python."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


NotBool = BeforeValidator(_no_bool)  # outermost, so that bounds reach the JSON schema
Integer = Annotated[int, NotBool]
Number = Annotated[float, Field(allow_inf_nan=False), NotBool]
Positive = Annotated[int, Field(gt=0), NotBool]
NonNegative = Annotated[int, Field(ge=0), NotBool]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), NotBool]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), NotBool]
Probability = Annotated[float, Field(ge=0, lt=1), NotBool]
Fraction = Annotated[float, Field(gt=0, lt=1), NotBool]
Sigma = PositiveFloat | Literal["median"]


def _module_attr(value: str) -> str:
    module, _, attribute = value.partition(":")
    if not module or not attribute or not module.replace(".", "_").isidentifier():
        raise ValueError(f"expected `module:attr`, got {value!r}")
    return value


# --- where things are ------------------------------------------------------------------------


class Stores(Section):
    """Stores outside the run folder, so that several runs share them (any fsspec URL)."""

    graph: str | None = Field(None, description="URL of the graph store; null: <run>/graph")
    knowledge: str | None = Field(None, description="URL of the knowledge store; null: <run>/knowledge")


class StorageConfig(Section):
    """How object stores are reached. Credentials come from the environment, never from here."""

    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="fsspec options per protocol, e.g. {s3: {endpoint_url: http://store:9000}}"
    )
    retries: NonNegative = Field(4, description="attempts after the first one, with growing pauses and jitter")
    timeout_s: PositiveFloat = Field(30.0, description="seconds until one request counts as failed")


class RayConfig(Section):
    """Which Ray the run uses."""

    address: str = Field("local", description="`local` starts one, `auto` finds one, or host:port")
    timeout_s: PositiveFloat = Field(30.0, description="seconds to wait for the cluster to answer")
    num_cpus: Positive | None = Field(None, description="logical CPUs of a local Ray; null: what the run needs")
    object_store_bytes: Annotated[int, Field(ge=80_000_000), NotBool] = Field(120_000_000, description="of a local Ray")


# --- the graph -------------------------------------------------------------------------------


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


class GraphConfig(Section):
    """Where the graph comes from."""

    source: Source
    split: Split | None = Field(None, description="null: the split of the data set")
    split_index: NonNegative = Field(0, description="which split, where a data set has several")
    normalize_features: bool = Field(False, description="scale each feature row to sum 1")
    undirected: bool = Field(False, description="add the reverse of every edge")
    keep_multi: bool = Field(False, description="keep duplicate edges instead of coalescing them")


class PartitionConfig(Section):
    """How the graph is cut."""

    method: Literal["metis", "random", "components"] = "metis"
    num_parts: Positive = 4
    halo_hops: Positive | Literal["auto"] = Field("auto", description="auto: what exactness needs")
    seed: Integer | None = Field(None, description="null: the seed of the run")


# --- models ----------------------------------------------------------------------------------

BUILT_IN_MODELS = ("gcn", "sage", "gat", "gin", "mlp")


class ModelConfig(Section):
    """A layered model, or any user class as ``module:attr``."""

    kind: str = Field(description="gcn | sage | gat | gin | mlp | module:attr")
    hidden: Positive = Field(64, description="width of a hidden layer; of each head where there are heads")
    layers: Positive = 2
    heads: Positive = Field(1, description="attention heads of hidden layers (gat)")
    norm: Literal["none", "layer", "batch"] = "layer"
    act: Literal["relu", "elu", "gelu", "leaky_relu", "tanh"] = "relu"
    dropout: Probability = Field(0.0, description="after each activation, and on attention coefficients (gat)")
    input_dropout: Probability = Field(0.0, description="on the input features")
    residual: bool = Field(False, description="add a linear skip of the input to each hidden layer")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of a user class")

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        if value in BUILT_IN_MODELS:
            return value
        if ":" not in value:
            raise ValueError(f"expected one of {', '.join(BUILT_IN_MODELS)} or module:attr, got {value!r}")
        return _module_attr(value)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.heads > 1 and self.kind in BUILT_IN_MODELS and self.kind != "gat":
            raise ValueError(f"only gat has heads (got kind {self.kind} with heads {self.heads}); set heads to 1")
        if self.args and self.kind in BUILT_IN_MODELS:
            raise ValueError("args is for module:attr models; built-in models take the keys beside it")
        return self


def resolve_layer(layer: int, num_layers: int) -> int:
    """Positive number (from 1) of ``layer``; negative numbers count from the end.

    Raises ValueError where the model has no such layer.
    """
    resolved = layer if layer > 0 else num_layers + 1 + layer
    if not 1 <= resolved <= num_layers or layer == 0:
        choices = f"1..{num_layers} or -{num_layers}..-1"
        raise ValueError(f"layer {layer} does not exist in a model of {num_layers} layers ({choices})")
    return resolved


# --- training --------------------------------------------------------------------------------


class LrSchedule(Section):
    """Learning-rate factor as a pure function of the step."""

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup: NonNegative = Field(0, description="steps of linear warm-up")
    final: Annotated[float, Field(ge=0, le=1), NotBool] = Field(0.0, description="factor at the last step")


AllOr = Positive | Literal["all"]


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
    checkpoint_every: Positive = Field(20, description="optimizer steps between checkpoints")
    keep: Positive = Field(2, description="checkpoints kept beside the best")
    log_every: Positive = Field(1, description="optimizer steps between TensorBoard points")


class TeacherTrainConfig(TrainConfig):
    """Training of the teacher: one process, the whole graph as one unit unless told otherwise."""

    parts_per_unit: AllOr = "all"
    threads: Positive = Field(2, description="torch threads")


class TeacherConfig(Section):
    """The large model: trained here, or read from a checkpoint."""

    name: str = Field("teacher", pattern=r"^[A-Za-z0-9_.-]+$")
    model: ModelConfig
    checkpoint: str | None = Field(None, description="URL of safetensors or a state_dict; null: trained by `gkd teach`")
    train: TeacherTrainConfig = TeacherTrainConfig()


class InferConfig(Section):
    """Exact teacher inference by Ray actors (``num_actors: 0``: in this process, without Ray)."""

    num_actors: NonNegative = 2
    gpus_per_actor: NonNegativeFloat = 0
    cpus_per_actor: NonNegativeFloat = 1
    threads: Positive = Field(1, description="torch threads of each actor")
    window: Positive = Field(2, description="tasks in flight per actor")
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="of stored logits, embeddings and scores")
    scores: Literal["auto", "scores", "embeddings"] = Field("auto", description="what LSP reads; auto: the smaller")
    max_restarts: NonNegative = 3
    max_task_retries: NonNegative = 2


class StudentConfig(Section):
    """The compact model."""

    model: ModelConfig
    alone: bool = Field(True, description="also train it without a teacher, for the table")


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
    teacher_layer: Integer = -2
    student_layer: Integer = -2

    @property
    def metric(self) -> str:
        """Metric of the raw edge score that the kernel is computed from."""
        return KERNEL_METRICS[self.kernel]


Loss = Annotated[LabelLoss | KdLoss | LspLoss, Field(discriminator="kind")]


class DistillConfig(TrainConfig):
    """Training of the student on many workers."""

    launcher: Literal["ray", "torchrun", "deepspeed", "inline"] = "ray"
    num_workers: Positive = 2
    gpus_per_worker: NonNegative = 0
    cpus_per_worker: NonNegativeFloat = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    units_per_step: AllOr = 2
    halo: Literal["hops"] = Field("hops", description="how halo activations come about: recomputed from stored hops")
    max_failures: NonNegative = Field(3, description="restarts of the worker group")
    collective_timeout_s: PositiveFloat = Field(300.0, description="bound of every wait between ranks")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="keys handed to DeepSpeed after a check")

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = {
            "train_batch_size": "distill.units_per_step",
            "train_micro_batch_size_per_gpu": "distill.units_per_step",
            "gradient_accumulation_steps": "distill.units_per_step",
            "optimizer": "distill.optimizer",
            "scheduler": "distill.lr_schedule",
            "gradient_clipping": "distill.grad_clip",
            "fp16": "distill.precision",
            "bf16": "distill.precision",
        }
        for key in value:
            if key in ours:
                raise ValueError(f"{key} is derived from {ours[key]}; set that instead")
        if isinstance(value.get("zero_optimization"), dict) and "stage" in value["zero_optimization"]:
            raise ValueError("zero_optimization.stage is derived from distill.zero_stage; set that instead")
        return value


# --- the run ---------------------------------------------------------------------------------


class Config(Section):
    """One run, in flow order."""

    run: str = Field(description="any fsspec URL; relative paths are local")
    stores: Stores = Stores()
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
    seed: Integer = 0
    graph: GraphConfig
    partition: PartitionConfig = PartitionConfig()
    teacher: TeacherConfig
    infer: InferConfig = InferConfig()
    student: StudentConfig
    losses: tuple[Loss, ...] = Field(min_length=1)
    distill: DistillConfig = DistillConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        for index, loss in enumerate(self.losses):
            if isinstance(loss, LspLoss):
                for side, model in (("teacher", self.teacher.model), ("student", self.student.model)):
                    layer = getattr(loss, f"{side}_layer")
                    try:
                        resolve_layer(layer, model.layers)
                    except ValueError as error:
                        raise ValueError(f"losses.{index}.{side}_layer: {error}") from None
        if self.distill.launcher == "inline" and self.distill.num_workers != 1:
            raise ValueError(
                f"distill.launcher inline is one process (got distill.num_workers {self.distill.num_workers}); "
                "set distill.num_workers=1 or distill.launcher=ray"
            )
        if self.run.startswith("memory:") and (self.infer.num_actors > 0 or self.distill.launcher != "inline"):
            raise ValueError(
                "a memory: run lives in one process; set infer.num_actors=0, distill.launcher=inline "
                "and distill.num_workers=1, or use a file or object store URL"
            )
        return self

    def knowledge_layers(self) -> dict[int, set[str]]:
        """Teacher layers (positive numbers) that LSP terms read, with the metrics they need."""
        needed: dict[int, set[str]] = {}
        for loss in self.losses:
            if isinstance(loss, LspLoss):
                layer = resolve_layer(loss.teacher_layer, self.teacher.model.layers)
                needed.setdefault(layer, set()).add(loss.metric)
        return needed

    def required_halo_hops(self) -> int:
        """Hops for which training is exact: depth for output terms, layer + 1 for LSP terms."""
        depth = self.student.model.layers if self.student.model.kind != "mlp" else 0
        hops = depth
        for loss in self.losses:
            if isinstance(loss, LspLoss):
                layer = resolve_layer(loss.student_layer, self.student.model.layers)
                hops = max(hops, 1 + (layer if self.student.model.kind != "mlp" else 0))
        if self.teacher.checkpoint is None and self.teacher.model.kind != "mlp":
            hops = max(hops, self.teacher.model.layers)
        return max(1, hops)

    def halo_hops(self) -> int:
        """Hops that the graph store is built with."""
        wanted = self.partition.halo_hops
        return self.required_halo_hops() if wanted == "auto" else wanted
