"""Graphs as plain arrays: an ``.npz`` file or a folder of ``.npy`` files, at any fsspec URL.

::

    graph.npz        or   graph/
                            x.npy           [N, f]   any real number type
                            edge_index.npy  [2, E]   integers, row 0 source, row 1 target
                            y.npy           [N]      classes, -1 unlabelled; or [N, c] binary labels
                            train_mask.npy  [N] or [N, k]   likewise val_mask, test_mask; optional
                            edge_weight.npy [E]      optional
                            edge_attr.npy   [E] or [E, a]   optional

Arrays are read with ``allow_pickle=False``: no code comes from data.
"""

from __future__ import annotations

import difflib
import io
import logging
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gkd_dist.config import StorageConfig
from gkd_dist.data.raw import RawGraph
from gkd_dist.errors import ConfigError, DataError, GraphError
from gkd_dist.graph import SPLITS
from gkd_dist.storage import Storage

_log = logging.getLogger(__name__)

REQUIRED = ("x", "edge_index", "y")
OPTIONAL = ("train_mask", "val_mask", "test_mask", "edge_weight", "edge_attr")
KEYS = REQUIRED + OPTIONAL

Array = NDArray[Any]


def read_arrays(url: str, storage: StorageConfig | None = None) -> RawGraph:
    """The graph at ``url``; raises `DataError` where there is none and `GraphError` where it is malformed."""
    arrays = _read_npz(url, storage) if url.endswith(".npz") else _read_folder(url, storage)
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise GraphError(
            f"{url} has no {' and no '.join(missing)} (it has {_listed(arrays)}); {_rename(missing[0], arrays)}"
        )
    unused = sorted(set(arrays) - set(KEYS))
    if unused:
        _log.warning("%s: arrays %s are not used (known: %s)", url, ", ".join(unused), ", ".join(KEYS))
    tensors = {key: to_tensor(arrays[key], f"{url}: {key}") for key in KEYS if key in arrays}
    masks = {split: tensors[f"{split}_mask"] for split in SPLITS if f"{split}_mask" in tensors}
    return RawGraph(
        name=url.rstrip("/").rpartition("/")[2].removesuffix(".npz"),
        x=tensors["x"],
        edge_index=tensors["edge_index"],
        y=tensors["y"],
        masks=masks,
        edge_weight=tensors.get("edge_weight"),
        edge_attr=tensors.get("edge_attr"),
    )


def save_arrays(path: str, data: Any, storage: StorageConfig | None = None) -> None:
    """Writes a homogeneous PyG ``Data`` (or a `Graph`) in the form that `read_arrays` reads.

    ``path`` is any fsspec URL: ``.npz`` makes one file, anything else a folder of ``.npy`` files. Of
    ``data`` the attributes x, edge_index and y are needed; masks, edge_weight and edge_attr go with them.
    Raises `GraphError` where one that is needed is not there.
    """
    path = str(path)
    found = {key: value for key in KEYS if (value := getattr(data, key, None)) is not None}
    missing = [key for key in REQUIRED if key not in found]
    if missing:
        raise GraphError(f"{type(data).__name__} has no {' and no '.join(missing)}; set them before save_arrays")
    arrays = {key: to_array(value, key) for key, value in found.items()}
    if path.endswith(".npz"):
        folder, name = _split(path)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        Storage.open(folder, storage).write(name, buffer.getbuffer())
        return
    store = Storage.open(path, storage)
    for key, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        store.write(f"{key}.npy", buffer.getbuffer())


def load_file(url: str, setting: str, storage: StorageConfig | None = None) -> Array:
    """The array in an ``.npy`` file, or the only one of an ``.npz`` archive; ``setting`` is where ``url`` comes from.

    Raises `DataError` where there is no such file and `GraphError` where it holds something else.
    """
    if not url.endswith((".npy", ".npz")):
        raise ConfigError(f"{setting} is {url}, expected an .npy or .npz file; write it with numpy.save and name that")
    folder, name = _split(url)
    store = Storage.open(folder, storage)
    if not store.exists(name):
        raise DataError(f"there is no file {url}; correct {setting}")
    loaded = _load(store, name, url)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        return np.asarray(loaded)
    with loaded as archive:
        if len(archive.files) != 1:
            raise GraphError(
                f"{url} holds {len(archive.files)} arrays ({', '.join(sorted(archive.files))}), expected one; "
                f"save that one with numpy.save and name it in {setting}"
            )
        return _member(archive, archive.files[0], url)


# --- reading ---------------------------------------------------------------------------------


def _read_npz(url: str, storage: StorageConfig | None) -> dict[str, Array]:
    folder, name = _split(url)
    store = Storage.open(folder, storage)
    if not store.exists(name):
        raise DataError(f"there is no file {url}; correct graph.source.path")
    archive = _load(store, name, url)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise GraphError(f"{url} is not an npz archive; write it with numpy.savez or gkd_dist.save_arrays")
    with archive:
        # Only the known arrays are decoded; the others are named so that they can be reported.
        return {key: _member(archive, key, url) if key in KEYS else np.empty(0) for key in archive.files}


def _read_folder(url: str, storage: StorageConfig | None) -> dict[str, Array]:
    store = Storage.open(url, storage)
    names = [key for key in KEYS if store.exists(f"{key}.npy")]
    if not names:
        raise DataError(
            f"there are no arrays in {url}, expected x.npy, edge_index.npy and y.npy; "
            "correct graph.source.path (a single file must end in .npz)"
        )
    return {key: _load(store, f"{key}.npy", f"{url}/{key}.npy") for key in names}


def _load(store: Storage, key: str, url: str) -> Any:
    """An array or an open archive; local files are read in place, others as bytes."""
    path = store.local_path(key)
    try:
        return np.load(io.BytesIO(store.read(key)) if path is None else path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(url, error) from error
    except OSError as error:  # only of a local file: a store translates its own
        raise DataError(f"{url} cannot be opened ({error.strerror}); check its permissions") from error


def _member(archive: Any, key: str, url: str) -> Array:
    try:
        return archive[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise _unreadable(f"{key} of {url}", error) from error


def _unreadable(what: str, error: Exception) -> GraphError:
    pickled = "pickle" in str(error)
    reason = "it holds Python objects, which are never unpickled" if pickled else str(error).strip().partition("\n")[0]
    return GraphError(
        f"{what} cannot be read as a plain array ({reason}); write it again with numpy.save or numpy.savez"
    )


def _split(url: str) -> tuple[str, str]:
    """Folder and name of a file; the folder keeps its slash, which may belong to ``memory://`` or be the root."""
    folder, slash, name = url.rpartition("/")
    return folder + slash or ".", name


def _listed(arrays: Mapping[str, Array]) -> str:
    return ", ".join(sorted(arrays)) if arrays else "no arrays"


def _rename(missing: str, arrays: Mapping[str, Array]) -> str:
    close = difflib.get_close_matches(missing, [key for key in arrays if key not in KEYS], n=1)
    return f"rename {close[0]} to {missing}" if close else f"add {missing}"


# --- between numpy and torch -----------------------------------------------------------------


def to_tensor(array: Array, what: str) -> Tensor:
    """A tensor of the same values; number types that torch computes little with are widened."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biuf":
        raise GraphError(f"{what} holds {array.dtype}, expected numbers or booleans; convert it before saving")
    if kind == "u" and size > 1:
        return torch.from_numpy(array.astype(np.int64))
    if kind == "f" and size not in (4, 8):
        return torch.from_numpy(array.astype(np.float32 if size == 2 else np.float64))
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def to_array(value: Any, key: str) -> Array:
    """A numpy array of a dense or sparse tensor (or of anything that numpy takes)."""
    if isinstance(value, Tensor):
        dense = value.detach().cpu()
        dense = dense if dense.layout == torch.strided else dense.to_dense()
        return np.asarray(dense.float() if dense.dtype in (torch.bfloat16, torch.float16) else dense)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise GraphError(f"{key} holds {array.dtype}, expected numbers or booleans; convert it before save_arrays")
    return array
