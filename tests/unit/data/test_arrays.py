"""npz files and folders of npy files, local and in an object store; never unpickled."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_graphs import path as path_graph
from torch_geometric.data import Data

from gkd_dist.data.arrays import read_arrays, save_arrays, to_tensor
from gkd_dist.errors import DataError, GraphError
from gkd_dist.storage import Storage

ARRAYS: dict[str, Any] = {
    "x": np.array([[0.0], [1.0], [2.0]]),
    "edge_index": np.array([[0, 1], [1, 2]], dtype=np.int32),
    "y": np.array([0, 1, -1]),
}


def save_folder(folder: Path, **arrays: Any) -> str:
    folder.mkdir(exist_ok=True)
    for key, array in arrays.items():
        np.save(folder / f"{key}.npy", array)
    return str(folder)


def save_npz(file: Path, **arrays: Any) -> str:
    np.savez(file, **arrays)
    return str(file)


@pytest.mark.parametrize("form", ["npz", "folder", "file-url", "compressed"])
def test_both_forms_give_the_same_graph(form: str, tmp_path: Path) -> None:
    arrays = {**ARRAYS, "train_mask": np.array([True, False, False]), "edge_weight": np.array([1.0, 0.5])}
    arrays["edge_attr"] = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    if form == "folder":
        url = save_folder(tmp_path / "graph", **arrays)
    elif form == "compressed":
        url = str(tmp_path / "graph.npz")
        np.savez_compressed(url, **arrays)
    else:
        url = ("file://" if form == "file-url" else "") + save_npz(tmp_path / "graph.npz", **arrays)
    raw = read_arrays(url)
    assert raw.name == "graph"
    assert raw.x.tolist() == [[0.0], [1.0], [2.0]]
    assert raw.edge_index.tolist() == [[0, 1], [1, 2]]
    assert raw.y.tolist() == [0, 1, -1]
    assert raw.masks["train"].tolist() == [True, False, False]
    assert set(raw.masks) == {"train"}
    assert raw.edge_weight is not None
    assert raw.edge_weight.tolist() == [1.0, 0.5]
    assert raw.edge_attr is not None
    assert raw.edge_attr.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "url", ["memory://arrays-test/graph.npz", "memory://arrays-test-graph.npz", "memory://arrays-test/g"]
)
def test_any_store_is_written_and_read(url: str) -> None:
    save_arrays(url, path_graph())
    assert read_arrays(url).edge_index.tolist() == [[0, 1, 2], [1, 2, 3]]
    Storage.open("memory://arrays-test").delete_tree("")


def test_a_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_arrays("graph.npz", path_graph())
    assert (tmp_path / "graph.npz").exists()
    assert read_arrays("graph.npz").num_nodes == 4


@pytest.mark.parametrize("name", ["graph.npz", "graph"])
def test_a_pyg_graph_is_saved_and_read_back(name: str, tmp_path: Path) -> None:
    data = Data(
        x=torch.eye(3).to_sparse_csr(),
        edge_index=torch.tensor([[0, 1], [1, 2]]),
        y=torch.tensor([0, 1, 1]),
        edge_weight=torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        edge_attr=torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16),
        train_mask=torch.tensor([[True, False], [False, True], [False, False]]),
    )
    save_arrays(str(tmp_path / name), data)
    raw = read_arrays(str(tmp_path / name))
    assert torch.equal(raw.x, torch.eye(3))
    assert raw.masks["train"].shape == (3, 2)
    assert raw.edge_weight is not None
    assert raw.edge_weight.tolist() == [1.0, 0.5]
    assert raw.edge_attr is not None
    assert raw.edge_attr.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_what_is_not_there_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="Data has no x and no y; set them before save_arrays"):
        save_arrays(str(tmp_path / "g.npz"), Data(edge_index=torch.tensor([[0], [1]])))


# --- faults ----------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*/graph\.npz; correct graph\.source\.path"):
        read_arrays(str(tmp_path / "graph.npz"))
    with pytest.raises(DataError, match=r"no arrays in .*, expected x\.npy, edge_index\.npy and y\.npy"):
        read_arrays(str(tmp_path))


def test_a_missing_array_with_a_likely_name(tmp_path: Path) -> None:
    url = save_npz(tmp_path / "g.npz", x=ARRAYS["x"], edge_idx=ARRAYS["edge_index"], y=ARRAYS["y"])
    with pytest.raises(GraphError, match=r"has no edge_index \(it has edge_idx, x, y\); rename edge_idx to edge_index"):
        read_arrays(url)


def test_an_unknown_array_is_reported_and_not_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = save_npz(tmp_path / "g.npz", **ARRAYS, names=np.array([{"a": 1}], dtype=object))
    with caplog.at_level(logging.WARNING):
        read_arrays(url)
    assert len(caplog.messages) == 1
    assert "arrays names are not used" in caplog.messages[0]


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_pickled_objects_are_refused(form: str, tmp_path: Path) -> None:
    arrays = {**ARRAYS, "y": np.array([0, {"any": "object"}, 1], dtype=object)}
    url = save_npz(tmp_path / "g.npz", **arrays) if form == "npz" else save_folder(tmp_path / "g", **arrays)
    with pytest.raises(GraphError, match="it holds Python objects, which are never unpickled"):
        read_arrays(url)


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x80\x04K\x01."])
def test_a_file_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.npz").write_bytes(content)
    with pytest.raises(GraphError, match=r"g\.npz cannot be read as a plain array"):
        read_arrays(str(tmp_path / "g.npz"))


def test_an_array_under_the_name_of_an_archive(tmp_path: Path) -> None:
    with (tmp_path / "g.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(GraphError, match="is not an npz archive"):
        read_arrays(str(tmp_path / "g.npz"))


def test_a_truncated_archive(tmp_path: Path) -> None:
    url = save_npz(tmp_path / "g.npz", **ARRAYS)
    Path(url).write_bytes(Path(url).read_bytes()[:-40])
    with pytest.raises(GraphError, match="cannot be read as a plain array"):
        read_arrays(url)


def test_a_flipped_byte_in_an_archive(tmp_path: Path) -> None:
    url = save_npz(tmp_path / "g.npz", **{**ARRAYS, "x": np.zeros((3, 1000))})
    content = bytearray(Path(url).read_bytes())
    content[4000] ^= 1
    Path(url).write_bytes(content)
    with pytest.raises(GraphError, match=r"x of .* cannot be read"):
        read_arrays(url)


# --- number types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bool", torch.bool),
        ("uint8", torch.uint8),
        ("uint32", torch.int64),
        ("uint64", torch.int64),
        (">i4", torch.int32),
        ("float16", torch.float32),
        (">f8", torch.float64),
        ("longdouble", torch.float64),
    ],
)
def test_number_types_that_torch_lacks_are_widened(dtype: str, expected: torch.dtype) -> None:
    tensor = to_tensor(np.array([0, 1, 1]).astype(dtype), "y")
    assert tensor.dtype == expected
    assert tensor.int().tolist() == [0, 1, 1]


def test_words_are_no_numbers() -> None:
    with pytest.raises(GraphError, match="g: y holds <U3, expected numbers or booleans"):
        to_tensor(np.array(["one", "two"]), "g: y")
