"""PyG data sets by class name: arguments, folders, seeds, and the sentence where the data cannot be had.

Nothing is downloaded: the classes below stand for published ones and fail the way those do.
"""

from __future__ import annotations

import os
import random
import socket
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, InMemoryDataset

from gkd_dist.config import PygSource
from gkd_dist.data.pyg import find_class, read_class, read_pyg, split_variants
from gkd_dist.data.raw import RawGraph
from gkd_dist.errors import ConfigError, DataError, GkdError, GraphError
from gkd_dist.graph import SPLITS


def source(name: str, args: dict[str, Any] | None = None) -> PygSource:
    return PygSource(kind="pyg", name=name, args=args or {})


def two_nodes(value: float) -> Data:
    return Data(x=torch.full((2, 1), value), edge_index=torch.tensor([[0], [1]]), y=torch.tensor([0, 1]))


class Published(InMemoryDataset):
    """Reads ``raw/value.txt``, which has to be downloaded, as the published data sets do."""

    url = "https://example.org/value"

    def __init__(self, root: str, name: str, transform: Any = None) -> None:
        assert name in ("one", "two"), f"no data set {name}"
        self.name = name
        super().__init__(root, transform)
        self.load(self.processed_paths[0])

    @property
    def raw_dir(self) -> str:
        return os.path.join(self.root, self.name, "raw")

    @property
    def processed_dir(self) -> str:
        return os.path.join(self.root, self.name, "processed")

    @property
    def raw_file_names(self) -> list[str]:
        return ["value.txt"]

    @property
    def processed_file_names(self) -> str:
        return "data.pt"

    def download(self) -> None:
        assert socket.getdefaulttimeout(), "a silent server would hang the run"
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    def process(self) -> None:
        self.save([two_nodes(float(Path(self.raw_paths[0]).read_text()))], self.processed_paths[0])


class Inductive(Published):
    """Other graphs for each split, like PPI."""

    def __init__(self, root: str, split: str = "train") -> None:
        self.split = split
        super().__init__(root, "one")

    @property
    def processed_file_names(self) -> str:
        return f"{self.split}.pt"

    def process(self) -> None:
        value = float(SPLITS.index(self.split))
        self.save([two_nodes(value), two_nodes(value)], self.processed_paths[0])


class Generated(InMemoryDataset):
    """Makes its graph up from all three global generators and keeps it under one name for all arguments."""

    def __init__(self, root: str, size: int = 2) -> None:
        self.size_ = size
        super().__init__(root)
        self.load(self.processed_paths[0])

    @property
    def processed_file_names(self) -> str:
        return "data.pt"

    def process(self) -> None:
        if self.size_ < 1:
            raise ValueError("size must be positive")
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        graph = two_nodes(0.0)
        graph.x = torch.tensor([drawn, [float(self.size_)] * 3])
        self.save([graph], self.processed_paths[0])


def put_raw(root: Path, content: str = "7") -> None:
    folder = root / "Published" / "one" / "raw"
    folder.mkdir(parents=True)
    (folder / "value.txt").write_text(content)


def read(cls: Any, root: Path, seed: int = 0, **args: Any) -> RawGraph:
    return read_class(cls, args, cls.__name__, seed, root)


def failure(cls: Any, root: Path, **args: Any) -> GkdError:
    with pytest.raises(GkdError) as caught:
        read(cls, root, **args)
    return caught.value


# --- what there is ---------------------------------------------------------------------------


def test_a_class_without_a_folder(tmp_path: Path) -> None:
    raw = read_pyg(source("KarateClub"), 0, tmp_path)
    assert (raw.num_nodes, raw.edge_index.size(1), list(raw.masks)) == (34, 156, ["train"])
    assert not list(tmp_path.iterdir())


def test_files_lie_under_the_class_name(tmp_path: Path) -> None:
    put_raw(tmp_path)
    assert read(Published, tmp_path, name="one").x.tolist() == [[7.0], [7.0]]
    assert (tmp_path / "Published" / "one" / "processed" / "data.pt").exists()


def test_pyg_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # PyG is quiet by itself while it is set
    put_raw(tmp_path)
    read(Published, tmp_path, name="one")
    assert capfd.readouterr() == ("", "")


def test_a_class_with_splits_is_loaded_three_times(tmp_path: Path) -> None:
    (tmp_path / "Inductive" / "one" / "raw").mkdir(parents=True)
    (tmp_path / "Inductive" / "one" / "raw" / "value.txt").write_text("0")
    raw = read(Inductive, tmp_path)
    assert raw.x.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    for value, split in enumerate(SPLITS):
        assert (raw.x.flatten()[raw.masks[split]] == value).all()
    assert not read(Inductive, tmp_path, split="val").masks


def test_only_classes_that_default_to_train_are_loaded_three_times() -> None:
    assert split_variants(find_class("Planetoid"), {"name": "Cora"}) == [(None, {"name": "Cora"})]
    assert [split for split, _ in split_variants(find_class("PPI"), {})] == ["train", "val", "test"]
    assert split_variants(find_class("PPI"), {"split": "train"}) == [(None, {"split": "train"})]


def test_a_generated_graph_follows_arguments_and_seed(tmp_path: Path) -> None:
    first = read(Generated, tmp_path, seed=1, size=2).x
    assert torch.equal(read(Generated, tmp_path, seed=1, size=2).x, first)
    assert (read(Generated, tmp_path, seed=2, size=2).x[0] != first[0]).all()
    assert read(Generated, tmp_path, seed=1, size=5).x[1].tolist() == [5.0] * 3
    assert not list(tmp_path.iterdir()), "nothing is kept that other arguments could find"


def test_global_state_is_put_back(tmp_path: Path) -> None:
    def state() -> tuple[Any, ...]:
        generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[union-attr,index]
        return (*generators, socket.getdefaulttimeout())

    before = state()
    read(Generated, tmp_path)
    failure(Published, tmp_path, name="one")
    assert state() == before


# --- what cannot be right --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"), [("planetoid", "Planetoid"), ("Plantoid", "Planetoid"), ("Cora", "CoraFull")]
)
def test_an_unknown_class_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"has no {name} \(did you mean {nearest}"):
        find_class(name)


@pytest.mark.parametrize("name", ["DBLP", "FakeHeteroDataset"])
def test_heterogeneous_classes_are_refused_before_a_download(name: str) -> None:
    with pytest.raises(GraphError, match=f"{name} is a heterogeneous data set"):
        find_class(name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"missing a required argument: 'name'; it takes name \(required\)"),
        ({"name": "one", "nme": 1}, "unexpected keyword argument 'nme'; it takes name"),
        ({"name": "three"}, r"Published \(name: three\) was refused \(no data set three\); it takes name \(required\)"),
        ({"name": "one", "root": "/data"}, "set the environment variable GKD_DATA instead"),
        ({"name": "one", "transform": "os:remove"}, "transform would have to be code, which a config never holds"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_class(Published, args, "Published", 0, tmp_path)


def test_wrong_arguments_of_a_generated_graph(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Generated \(size: 0\) was refused \(size must be positive\); it takes size"
    ):
        read(Generated, tmp_path, size=0)


# --- what cannot be had ----------------------------------------------------------------------


def test_a_failed_download_is_one_sentence(tmp_path: Path) -> None:
    error = failure(Published, tmp_path, name="two")
    folder = tmp_path / "Published" / "two" / "raw"
    assert isinstance(error, DataError)
    assert str(error) == (
        f"the data set Published (name: two) is not in {folder} and cannot be downloaded from "
        "https://example.org/value ([Errno -2] Name or service not known); copy its raw files (value.txt) there, "
        "or set GKD_DATA to a folder that holds Published/two/raw"
    )
    assert isinstance(error.__cause__, urllib.error.URLError)


@pytest.mark.timeout(60)
def test_a_published_class_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that refuses (nobody listens on port 9) stands for a machine without a network."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(DataError) as caught:
        read_pyg(source("Amazon", args={"name": "Photo"}), 0, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"the data set Amazon (name: Photo) is not in {tmp_path}/Amazon/Photo/raw and cannot be ")
    assert message.endswith("or set GKD_DATA to a folder that holds Amazon/Photo/raw")
    assert "Connection refused" in message


def test_a_raw_file_that_cannot_be_read(tmp_path: Path) -> None:
    put_raw(tmp_path, "no number")
    error = failure(Published, tmp_path, name="one")
    assert isinstance(error, DataError)
    assert "cannot be read (could not convert string to float: 'no number')" in str(error)
    assert f"delete {tmp_path / 'Published' / 'one'} so that it is fetched again" in str(error)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    class Special(Published):
        def process(self) -> None:
            raise ModuleNotFoundError("No module named 'rdkit'")

    (tmp_path / "Special" / "one" / "raw").mkdir(parents=True)
    (tmp_path / "Special" / "one" / "raw" / "value.txt").write_text("0")
    with pytest.raises(
        ConfigError, match=r"Special needs a Python package that is not installed \(No module named 'rdkit'\)"
    ):
        read(Special, tmp_path, name="one")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    class Guarded(Published):
        def process(self) -> None:
            raise PermissionError(13, "Permission denied")

    (tmp_path / "Guarded" / "one" / "raw").mkdir(parents=True)
    (tmp_path / "Guarded" / "one" / "raw" / "value.txt").write_text("0")
    with pytest.raises(DataError, match="because PyG writes its processed files beside the raw ones"):
        read(Guarded, tmp_path, name="one")
