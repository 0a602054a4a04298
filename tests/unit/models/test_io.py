"""Model folders and users' checkpoints: what goes in comes out, and nothing stored can run code."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import NUM_CLASSES, NUM_FEATURES, path
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from gkd_dist import layout, load_model, load_student, load_teacher
from gkd_dist.config import ModelConfig
from gkd_dist.errors import ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.build import build_model
from gkd_dist.models.io import (
    ModelSpec,
    read_checkpoint,
    read_model,
    read_model_document,
    read_weights,
    save_model,
)
from gkd_dist.models.layered import forward_layers
from gkd_dist.shards.seal import sealed
from gkd_dist.storage import Storage

GCN = ModelConfig(kind="gcn", hidden=4, norm="batch")
PLAIN = ModelConfig(kind="user_models:Plain", args={"scale": 2.0})


def save(storage: Storage, config: ModelConfig = GCN) -> nn.Module:
    """A model in ``storage``, and the module itself in eval mode."""
    model = build_model(config, NUM_FEATURES, NUM_CLASSES).eval()
    for buffer in model.buffers():
        buffer.add_(torch.rand_like(buffer))
    spec = ModelSpec(config, NUM_FEATURES, NUM_CLASSES, "multiclass", {"epoch": 7})
    save_model(storage, model, spec, fingerprint="f" * 64)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "model"))


def edit(storage: Storage, **changes: object) -> None:
    """Changes top-level keys of ``model.json`` and seals it again; None removes one."""
    document = {**storage.read_json(layout.MODEL_JSON), "seal": None, **changes}
    storage.write_json(layout.MODEL_JSON, sealed({key: value for key, value in document.items() if value is not None}))


# --- round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin", "mlp"])
def test_a_stored_model_comes_back(folder: Storage, kind: str) -> None:
    graph, model = path(), save(folder, ModelConfig(kind=kind, hidden=4, norm="batch", residual=True, dropout=0.5))
    found, spec = read_model(folder)
    assert not found.training
    assert torch.equal(found(graph.x, graph.edge_index), model(graph.x, graph.edge_index))
    assert spec.config == ModelConfig(kind=kind, hidden=4, norm="batch", residual=True, dropout=0.5)
    assert (spec.in_channels, spec.out_channels, spec.task, spec.meta) == (3, 2, "multiclass", {"epoch": 7})


def test_bf16_weights_come_back_bit_for_bit(folder: Storage) -> None:
    model = build_model(GCN, NUM_FEATURES, NUM_CLASSES).bfloat16()
    save_model(folder, model, ModelSpec(GCN, NUM_FEATURES, NUM_CLASSES, "multiclass"), "f")
    weights, num_bytes = read_weights(folder)
    assert num_bytes == folder.size(layout.MODEL_WEIGHTS)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_description_says_what_is_stored(folder: Storage) -> None:
    model = save(folder)
    document = read_model_document(folder)
    assert document["num_params"] == sum(p.numel() for p in model.parameters()) == (3 * 4 + 4) + 8 + (4 * 2 + 2)
    assert document["layer_names"] == ["layer 1", "layer 2"]
    assert document["fingerprint"] == "f" * 64
    assert document["weights"]["num_bytes"] == folder.size(layout.MODEL_WEIGHTS)


def test_short_names_of_a_run(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path))
    for key, load in ((layout.TEACHER, load_teacher), (layout.student("distilled"), load_student)):
        model, graph = save(run.child(key)), path()
        expected = model(graph.x, graph.edge_index)
        assert torch.equal(load(run.url)(graph.x, graph.edge_index), expected)
        assert torch.equal(load_model(run.child(key).url)(graph.x, graph.edge_index), expected)


# --- damage ----------------------------------------------------------------------------------


def damage_weights(change: Callable[[bytes], bytes]) -> Callable[[Storage], None]:
    return lambda storage: storage.write(layout.MODEL_WEIGHTS, change(storage.read(layout.MODEL_WEIGHTS)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights(lambda data: data[:-1]), r"model.safetensors is truncated or altered \([\d,]+ bytes, expected"),
        (damage_weights(lambda data: b""), r"truncated or altered \(0 bytes, expected"),
        (damage_weights(lambda data: data[:-1] + bytes([data[-1] ^ 1])), r"model.safetensors is altered \(its sha256"),
        (lambda storage: storage.delete(layout.MODEL_WEIGHTS), r"model.safetensors is missing; train the model again"),
        (lambda storage: storage.delete(layout.MODEL_JSON), r"no model at .*model.json is missing.*correct the URL"),
        (lambda storage: storage.write(layout.MODEL_JSON, b'{"format_'), r"model.json is not JSON; write the model"),
        (lambda storage: storage.write_json(layout.MODEL_JSON, [1]), "is not a model description"),
        (lambda storage: edit(storage, format_version=3), r"has format 3, this version reads 2; upgrade gkd_dist"),
        (lambda storage: edit(storage, format_version="1"), "is not a model description"),
        (lambda storage: edit(storage, weights=None), "does not say which weights it is about"),
        (lambda storage: edit(storage, weights={"num_bytes": "many", "sha256": ""}), "does not say which weights"),
        (lambda storage: edit(storage, in_channels=None), r"lacks or garbles a field \('in_channels'\)"),
        (lambda storage: edit(storage, config={"kind": "transformer"}), "lacks or garbles a field"),
    ],
)  # fmt: skip
def test_damage_is_named_and_never_a_wrong_model(
    folder: Storage, damage: Callable[[Storage], None], message: str
) -> None:
    save(folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        read_model(folder)


def test_a_description_of_another_width_does_not_fit(folder: Storage) -> None:
    save(folder)
    edit(folder, in_channels=5)
    with pytest.raises(
        ModelError,
        match=r"1 of another shape \(convs.0.lin.weight \[4, 3\], needed \[4, 5\]\); .*use data of the same width",
    ):
        read_model(folder)


def test_an_altered_description_is_noticed(folder: Storage) -> None:
    save(folder)
    document = folder.read_json(layout.MODEL_JSON)
    for changes in ({"task": "multilabel"}, {"format_version": 1}, {"format_version": 0}, {"seal": None}):
        folder.write_json(layout.MODEL_JSON, document | changes)
        with pytest.raises(ModelError, match=r"does not match its seal|is not a model description"):
            read_model(folder)


def test_a_description_of_version_1_had_no_seal(folder: Storage) -> None:
    model, graph = save(folder), path()
    document = folder.read_json(layout.MODEL_JSON)
    del document["seal"]
    folder.write_json(layout.MODEL_JSON, document | {"format_version": 1})
    assert torch.equal(read_model(folder)[0](graph.x, graph.edge_index), model(graph.x, graph.edge_index))


# --- no code from data (C8) ------------------------------------------------------------------


def test_a_users_class_is_only_imported_where_it_is_named(
    folder: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "eager_user.py").write_text(f"open({str(marker)!r}, 'w').close()\nfrom user_models import Plain\n")
    monkeypatch.syspath_prepend(tmp_path)
    graph, model = path(), save(folder, PLAIN)
    edit(folder, config={**PLAIN.model_dump(mode="json"), "kind": "eager_user:Plain"})
    for allowed in ((), ("user_models:Plain",)):
        with pytest.raises(
            ModelError, match=r"the user class eager_user:Plain; pass allow_code=\['eager_user:Plain'\]"
        ):
            read_model(folder, allowed)
    read_weights(folder)
    read_checkpoint(folder.url)
    assert not marker.exists(), "a stored description made code run"
    found, _ = read_model(folder, ["eager_user:Plain"])
    assert marker.exists()
    assert torch.equal(found(graph.x, graph.edge_index), model(graph.x, graph.edge_index))


class Explosive:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt"])
def test_a_pickle_with_code_is_refused(tmp_path: Path, name: str, legacy: bool) -> None:
    marker = tmp_path / "exploded"
    state = {"weight": torch.ones(2), "extra": Explosive(marker)}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ModelError, match=r"holds more than tensors .*; save it as safetensors or as a plain state_dict"
    ):
        read_checkpoint(str(tmp_path / name))
    assert not marker.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    message = (
        r"more than tensors \(torch.nn.modules.linear.Linear.*; save it as .*torch.save\(model.state_dict\(\), path\)"
    )
    with pytest.raises(ModelError, match=message):
        read_checkpoint(str(tmp_path / "module.pt"))


# --- users' checkpoints ----------------------------------------------------------------------

STATE = {"lin.weight": torch.arange(6.0).view(2, 3), "lin.bias": torch.tensor([1, 2], dtype=torch.bfloat16)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model_state_dict": STATE, "optimizer": {"lr": 0.1}},
        {"model": STATE},
        {f"module.{name}": value for name, value in STATE.items()},
    ],
    ids=["plain", "lightning", "tutorial", "model", "data parallel"],
)
def test_state_dicts_in_their_usual_wrappings(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.pt").write_bytes(saved(value))
    assert_same(read_checkpoint(str(tmp_path / "a.pt")))
    assert_same(read_checkpoint(f"file://{tmp_path}/a.pt"))


def test_a_submodule_called_module_keeps_its_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "a.pt")
    assert_same(read_checkpoint(str(tmp_path / "a.pt")), state)


def test_safetensors_of_another_writer(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save_safetensors(STATE, {"format": "pt"}))
    assert_same(read_checkpoint(str(tmp_path / "a.safetensors")))


def test_a_model_folder_is_a_checkpoint(folder: Storage) -> None:
    expected = save(folder).state_dict()
    assert_same(read_checkpoint(folder.url), expected)
    assert_same(read_checkpoint(folder.url + "/"), expected)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pt", saved(STATE)[:-40], "a.pt is truncated or holds more than tensors"),
        ("a.pt", b"", "a.pt is truncated or holds more than tensors"),
        ("a.pt", saved([1, 2]), "a.pt is no state_dict of tensors; save model.state_dict()"),
        ("a.pt", saved({"epoch": 3}), "a.pt is no state_dict of tensors"),
        ("a.safetensors", save_safetensors(STATE)[:-1], "a.safetensors is truncated or no safetensors file"),
        ("a.safetensors", saved(STATE), "a.safetensors is truncated or no safetensors file"),
        ("a.safetensors", b"", "a.safetensors is truncated or no safetensors file"),
    ],
)
def test_checkpoints_that_are_none(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_a_missing_checkpoint_names_the_key_that_is_wrong(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=rf"no checkpoint at .*{name}; correct teacher.checkpoint or set it to null"):
        read_checkpoint(str(tmp_path / name))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at file://.*missing"):
        read_checkpoint(str(tmp_path / "missing"))


def test_json_is_readable_by_people(folder: Storage) -> None:
    save(folder)
    text = folder.read(layout.MODEL_JSON).decode()
    assert len(text.splitlines()) > 10
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_layers_without_a_forward_get_one(folder: Storage) -> None:
    kind = "user_models:Layered"
    model = save(folder, ModelConfig(kind=kind))
    loaded = load_model(folder.url, allow_code=[kind])
    x, edge_index = torch.randn(4, NUM_FEATURES), torch.tensor([[0, 1, 3], [1, 2, 2]])
    graph = LocalGraph.from_edge_index(edge_index, 4)
    assert torch.equal(loaded(x, edge_index), forward_layers(model, x, graph)[0])
    assert torch.equal(loaded(x, graph), loaded(x, edge_index))
