"""Named features from files: read, checked, and brought into form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gkd_dist.data.features import read_named_features
from gkd_dist.errors import ConfigError, DataError, GraphError
from gkd_dist.storage import Storage

NAN = float("nan")


def saved(file: Path, array: Any) -> str:
    np.save(file, array)
    return str(file)


def test_features_are_read_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", anything=np.array([1, 2, 3], dtype=np.uint8))
    urls = {"a": saved(tmp_path / "a.npy", np.arange(6.0).reshape(3, 2)), "b": f"file://{tmp_path}/b.npz"}
    found = read_named_features(urls, 3)
    assert {name: values.tolist() for name, values in found.items()} == {
        "a": [[0, 1], [2, 3], [4, 5]],
        "b": [[1], [2], [3]],
    }
    assert {values.dtype for values in found.values()} == {torch.float32}


def test_features_in_an_object_store(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.npy", np.ones((3, 2)))
    Storage.open("memory://features-test").write("deep/a.npy", Path(file).read_bytes())
    assert read_named_features({"a": "memory://features-test/deep/a.npy"}, 3)["a"].shape == (3, 2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 5)), r"has shape \[2, 5\], expected \[3, f\] with f at least 1; give one row per node"),
        (np.ones((3, 0)), r"has shape \[3, 0\], expected \[3, f\]"),
        (np.ones((3, 2, 2)), r"has shape \[3, 2, 2\]"),
        (np.array([[0.0], [NAN], [np.inf]]), r"holds 2 NaN or infinite values \(first at node 1\); replace or drop"),
        (np.array([[0.0], [1e300], [1.0]]), r"holds 1 NaN or infinite values \(first at node 1\)"),
        (np.array(["a", "b", "c"]), r"holds <U1, expected numbers or booleans"),
    ],
)
def test_features_that_do_not_fit(array: Any, message: str, tmp_path: Path) -> None:
    url = saved(tmp_path / "a.npy", array)
    with pytest.raises(GraphError, match=rf"graph\.features\.big \({url}\) {message}"):
        read_named_features({"big": url}, 3)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*a\.npy; correct graph\.features\.big"):
        read_named_features({"big": str(tmp_path / "a.npy")}, 3)
    with pytest.raises(ConfigError, match=r"graph\.features\.big is a\.pt, expected an \.npy or \.npz file"):
        read_named_features({"big": "a.pt"}, 3)
    np.savez(tmp_path / "two.npz", a=np.ones(3), b=np.ones(3))
    with pytest.raises(GraphError, match=r"two\.npz holds 2 arrays \(a, b\), expected one"):
        read_named_features({"big": str(tmp_path / "two.npz")}, 3)
    with pytest.raises(GraphError, match="never unpickled"):
        read_named_features({"big": saved(tmp_path / "o.npy", np.array([{}, 1, 2], dtype=object))}, 3)
