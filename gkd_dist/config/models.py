"""Models by kind, and how their layers are numbered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gkd_dist.config.base import Positive, Probability, Section

BUILT_IN_MODELS = ("gcn", "sage", "gat", "gin", "mlp")
_PYG = "torch_geometric."  # models of PyG: their depth and width are arguments of known names
_PYG_NAMES = {"layers": "num_layers", "hidden": "hidden_channels"}
_BUILT_IN_ONLY = ("heads", "norm", "act", "dropout", "input_dropout", "dropout_mask", "residual", "node_embedding")


def _module_attr(value: str) -> str:
    module, _, attribute = value.partition(":")
    if not module or not attribute or not module.replace(".", "_").isidentifier():
        raise ValueError(f"expected `module:attr`, got {value!r}")
    return value


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
    dropout_mask: Literal["node", "unit"] = Field(
        "node",
        description="node: a hash of node and channel, the same for every copy of a node; unit: torch's generator",
    )
    residual: bool = Field(False, description="add a linear skip of the input to each hidden layer")
    node_embedding: Positive | None = Field(None, description="width of a learned vector for each node of the graph")
    node_embedding_mode: Literal["concat", "replace"] = Field(
        "concat", description="concat: the vectors stand beside the features; replace: in their place"
    )
    num_nodes: Positive | None = Field(None, description="rows of node_embedding; null: the nodes of the graph")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of a module:attr class")

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        if value in BUILT_IN_MODELS:
            return value
        if ":" not in value:
            raise ValueError(f"expected one of {', '.join(BUILT_IN_MODELS)} or module:attr, got {value!r}")
        return _module_attr(value)

    @model_validator(mode="before")
    @classmethod
    def _take_from_args(cls, values: Any) -> Any:
        """Depth and width of a PyG model may be given among its ``args`` alone."""
        if not isinstance(values, dict) or not str(values.get("kind")).startswith(_PYG):
            return values
        args = values.get("args")
        args = args if isinstance(args, dict) else {}
        return {**{key: args[name] for key, name in _PYG_NAMES.items() if name in args}, **values}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.heads > 1 and self.kind in BUILT_IN_MODELS and self.kind != "gat":
            raise ValueError(f"only gat has heads (got kind {self.kind} with heads {self.heads}); set heads to 1")
        if self.args and self.kind in BUILT_IN_MODELS:
            raise ValueError("args is for module:attr models; built-in models take the keys beside it")
        if self.kind.startswith(_PYG):
            self._check_pyg()
        self._check_embedding()
        return self

    def _check_embedding(self) -> None:
        if self.node_embedding is not None and self.kind not in BUILT_IN_MODELS:
            raise ValueError(
                f"node_embedding is for built-in models (got kind {self.kind}); a class of your own finds the numbers "
                "of its nodes in graph.global_ids(), see docs/models.md"
            )
        if self.node_embedding is None:
            for key in ("node_embedding_mode", "num_nodes"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} says how node_embedding works, which is not set; set node_embedding")

    def _check_pyg(self) -> None:
        for key, name in _PYG_NAMES.items():
            beside, inside = getattr(self, key), self.args.get(name, getattr(self, key))
            if beside != inside:
                raise ValueError(f"{key} is {beside} but args.{name} is {inside}; keep one of them, or make them equal")
        for key in _BUILT_IN_ONLY:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for built-in models; give {self.kind} what it takes under args")


def resolve_layer(layer: int, num_layers: int) -> int:
    """Positive number (from 1) of ``layer``; negative numbers count from the end.

    Raises ValueError where the model has no such layer.
    """
    resolved = layer if layer > 0 else num_layers + 1 + layer
    if not 1 <= resolved <= num_layers or layer == 0:
        choices = f"1..{num_layers} or -{num_layers}..-1"
        raise ValueError(f"layer {layer} does not exist in a model of {num_layers} layers ({choices})")
    return resolved
