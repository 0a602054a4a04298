"""Model folders: ``model.json`` (what to build) and ``model.safetensors`` (the weights).

Nothing stored here can run code: a ``module:attr`` model is only imported where the caller names it
in ``allow_code``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gkd_dist import layout
from gkd_dist.config import BUILT_IN_MODELS, ModelConfig, StorageConfig
from gkd_dist.errors import DataError, JsonError, ModelError, NewerModelError, ObjectNotFoundError
from gkd_dist.models.build import build_model
from gkd_dist.models.fit import load_weights
from gkd_dist.models.layered import with_forward
from gkd_dist.shards.codec import decode, encode
from gkd_dist.shards.seal import SEAL, is_sealed, sealed
from gkd_dist.storage import Storage

FORMAT_VERSION = 2  # 1 had no seal


@dataclass(frozen=True)
class ModelSpec:
    """Everything beside the weights that is needed to rebuild and use a model.

    ``features``: the named features of the graph that it reads, None: the graph's own ``x``.
    """

    config: ModelConfig
    in_channels: int
    out_channels: int
    task: str
    meta: dict[str, Any] = field(default_factory=dict)
    features: str | None = None


def save_model(storage: Storage, model: nn.Module, spec: ModelSpec, fingerprint: str) -> str:
    """Writes weights, then ``model.json``; returns the sha256 of the weights."""
    data = encode({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
    digest = hashlib.sha256(data).hexdigest()
    storage.write(layout.MODEL_WEIGHTS, data)
    document = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "config": spec.config.model_dump(mode="json"),
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "task": spec.task,
        "features": spec.features,
        "layer_names": [f"layer {layer}" for layer in range(1, spec.config.layers + 1)],
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "weights": {"key": layout.MODEL_WEIGHTS, "num_bytes": len(data), "sha256": digest},
        "meta": spec.meta,
    }
    storage.write_json(layout.MODEL_JSON, sealed(document))
    return digest


def read_model_document(storage: Storage) -> dict[str, Any]:
    """``model.json`` after a check of its version; `ModelError` where it is missing or malformed."""
    where = f"{storage.url}/{layout.MODEL_JSON}"
    try:
        document = storage.read_json(layout.MODEL_JSON)
    except ObjectNotFoundError as error:
        raise ModelError(
            f"no model at {storage.url} ({layout.MODEL_JSON} is missing); train one or correct the URL"
        ) from error
    except JsonError as error:
        raise ModelError(f"{where} is not JSON; write the model again") from error
    if (
        not isinstance(document, dict)
        or type(document.get("format_version")) is not int
        or document["format_version"] < 1
    ):
        raise ModelError(f"{where} is not a model description; write the model again")
    if document["format_version"] > FORMAT_VERSION:
        raise NewerModelError(
            f"{where} has format {document['format_version']}, this version reads {FORMAT_VERSION}; upgrade gkd_dist"
        )
    if is_sealed(document) if document["format_version"] > 1 else SEAL not in document:
        return _with_weights(document, where)
    raise ModelError(f"{where} was altered (its content does not match its seal); write the model again")


def _with_weights(document: dict[str, Any], where: str) -> dict[str, Any]:
    """``document`` after a check that it says which weights it is about."""
    weights = document.get("weights")
    if not isinstance(weights, dict) or type(weights.get("num_bytes")) is not int or "sha256" not in weights:
        raise ModelError(f"{where} does not say which weights it is about; write the model again")
    return document


def _spec(document: dict[str, Any], where: str) -> ModelSpec:
    try:
        return ModelSpec(
            ModelConfig.model_validate(document["config"]),
            int(document["in_channels"]),
            int(document["out_channels"]),
            str(document["task"]),
            dict(document.get("meta", {})),
            None if document.get("features") is None else str(document["features"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ValidationError) as error:
        raise ModelError(f"{where} lacks or garbles a field ({error}); write the model again") from error


def read_model(storage: Storage, allow_code: Collection[str] = ()) -> tuple[nn.Module, ModelSpec]:
    """The module in eval mode and its description.

    ``allow_code`` names the ``module:attr`` classes that may be imported. Raises `ModelError`
    for a missing, truncated or altered model.
    """
    document = read_model_document(storage)
    spec = _spec(document, f"{storage.url}/{layout.MODEL_JSON}")
    kind = spec.config.kind
    if kind not in BUILT_IN_MODELS and kind not in allow_code:
        raise ModelError(
            f"the model at {storage.url} is the user class {kind}; pass allow_code=[{kind!r}] to import it"
        )
    model = build_model(spec.config, spec.in_channels, spec.out_channels)
    load_weights(model, _read_weights(storage, document), storage.url)
    return model.eval(), spec


def read_weights(storage: Storage) -> tuple[dict[str, Tensor], int]:
    """Weights of a model folder after a check of their digest, and their bytes."""
    document = read_model_document(storage)
    weights = _read_weights(storage, document)
    return weights, int(document["weights"]["num_bytes"])


def _read_weights(storage: Storage, document: dict[str, Any]) -> dict[str, Tensor]:
    where = f"{storage.url}/{layout.MODEL_WEIGHTS}"
    try:
        data = storage.read(layout.MODEL_WEIGHTS)
    except ObjectNotFoundError as error:
        raise ModelError(f"{where} is missing; train the model again") from error
    expected = document["weights"]
    if len(data) != expected["num_bytes"]:
        raise ModelError(
            f"{where} is truncated or altered ({len(data):,} bytes, expected {expected['num_bytes']:,}); "
            "train the model again"
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ModelError(f"{where} is altered (its sha256 is not that of {layout.MODEL_JSON}); train the model again")
    return decode(data)


def read_checkpoint(url: str, config: StorageConfig | None = None) -> dict[str, Tensor]:
    """Weights from a user's checkpoint: a model folder, a safetensors file or a ``state_dict``.

    A ``state_dict`` is read with ``weights_only=True``, so no code runs. Raises `ModelError`.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".ckpt")):
        storage = Storage.open(parent or ".", config)
        try:
            data = storage.read(name)
        except ObjectNotFoundError as error:
            raise ModelError(
                f"no checkpoint at {url}; correct teacher.checkpoint or set it to null to train one"
            ) from error
        return _decode_safetensors(data, url) if name.endswith(".safetensors") else _decode_state_dict(data, url)
    storage = Storage.open(url, config)
    return _read_weights(storage, read_model_document(storage))


def _decode_safetensors(data: bytes, url: str) -> dict[str, Tensor]:
    try:
        return decode(data)
    except DataError as error:
        raise ModelError(
            f"the checkpoint {url} is truncated or no safetensors file ({error}); copy it again"
        ) from error


def _decode_state_dict(data: bytes, url: str) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a bad file; all mean the same to the user
        found = _objects(data)
        holds = (
            f"holds more than tensors ({found})"
            if found
            else f"is truncated or holds more than tensors ({error!s:.40})"
        )
        raise ModelError(
            f"the checkpoint {url} {holds}, and objects can run code when they are read; "
            "save it as safetensors or as a plain state_dict: torch.save(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"the checkpoint {url} is no state_dict of tensors; save model.state_dict()")
    wrapped = all(name.startswith("module.") for name in state)  # saved from DataParallel
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


def _objects(data: bytes) -> str:
    """Classes and functions that a pickle names beside tensors, without running any; empty where unknown."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # not a zip file of torch: a legacy or a damaged one
        return ""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def load_model(url: str, allow_code: Collection[str] = (), storage: StorageConfig | None = None) -> nn.Module:
    """The module stored at ``url`` in eval mode; ``forward(x, edge_index)`` on a whole graph."""
    return with_forward(read_model(Storage.open(url, storage), allow_code)[0])


def load_student(
    run: str, name: str = "distilled", allow_code: Collection[str] = (), storage: StorageConfig | None = None
) -> nn.Module:
    """The student ``name`` of the run at URL ``run``."""
    return with_forward(read_model(Storage.open(run, storage).child(layout.student(name)), allow_code)[0])


def load_teacher(
    run: str, allow_code: Collection[str] = (), storage: StorageConfig | None = None, *, name: str | None = None
) -> nn.Module:
    """The teacher of the run at URL ``run``; ``name`` says which where there are several."""
    opened = Storage.open(run, storage)
    folder = opened.child(layout.TEACHER if name is None else layout.one_teacher(name))
    if not folder.exists(layout.MODEL_JSON):
        names = sorted({key.partition("/")[0] for key in opened.child(layout.TEACHERS).list()})
        if names:
            raise ModelError(
                f"the run at {opened.url} has {'several teachers' if name is None else f'no teacher {name!r}'}; "
                f"name one of {', '.join(names)}, e.g. load_teacher(run, name={names[0]!r})"
            )
    return with_forward(read_model(folder, allow_code)[0])
