"""Any data set class of ``torch_geometric.datasets``, by name, as one homogeneous graph.

A class that takes a folder gets ``<data root>/<ClassName>``: PyG keeps what it downloaded there and
its processed files beside it. Classes that make their graph up get a temporary folder, because PyG
would read a stored one back for other arguments or another seed.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import logging
import random
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric import datasets
from torch_geometric.data import Dataset

from gkd_dist.config import EdgeAttr, PygSource
from gkd_dist.data.pyg_graph import homogeneous, join
from gkd_dist.data.raw import RawGraph
from gkd_dist.errors import ConfigError, DataError, GkdError, GraphError
from gkd_dist.graph import SPLITS

_log = logging.getLogger(__name__)
_STALL_S = 30.0  # a download that delivers nothing for so long has failed
_NOT_FROM_CONFIG = ("transform", "pre_transform", "pre_filter")


def read_pyg(source: PygSource, seed: int, root: Path, attributes: EdgeAttr = "auto") -> RawGraph:
    """The data set ``source`` names; graphs of a set of several become one disconnected graph.

    A class that takes ``split`` (train by default) and was given none is loaded three times, and each
    split becomes a mask. ``attributes``: what becomes of ``edge_attr``. Raises `ConfigError` for an
    unknown class or wrong arguments, `DataError` where the data cannot be had, `GraphError` where they
    are no homogeneous graph.
    """
    title = " ".join([source.name, *(str(source.args[key]) for key in ("name", "dataset") if key in source.args)])
    return read_class(find_class(source.name), source.args, title, seed, root, attributes)


def read_class(
    cls: Any, args: dict[str, Any], title: str, seed: int, root: Path, attributes: EdgeAttr = "auto"
) -> RawGraph:
    """`read_pyg` for a class that is known already; ``title`` is what messages call its graph."""
    _check_args(cls, args)
    pieces: list[tuple[str | None, RawGraph]] = []
    for split, variant in split_variants(cls, args):
        dataset = _construct(cls, variant, seed, root)
        pieces += [(split, homogeneous(data, title, attributes)) for data in dataset]
    return join(pieces, title)


# --- what the config asks for ----------------------------------------------------------------


def find_class(name: str) -> Any:
    """The class ``name`` of ``torch_geometric.datasets``.

    Raises `ConfigError` with the nearest names where there is none, `GraphError` where its graphs are
    known to be heterogeneous (before anything is downloaded).
    """
    known = list(datasets.__all__)
    if name in getattr(datasets, "hetero_datasets", ()) or "Hetero" in name:
        raise GraphError(
            f"{name} is a heterogeneous data set, and graphs here are homogeneous only; choose another one"
        )
    if name in known:
        return getattr(datasets, name)
    lowered = {other.lower(): other for other in known}
    close = [other for other in known if name.lower() in other.lower()]
    close += [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered)]
    hint = f" (did you mean {' or '.join(list(dict.fromkeys(close))[:3])}?)" if close else ""
    raise ConfigError(
        f"graph.source.name: torch_geometric.datasets has no {name}{hint}; name a class, and the data set of a "
        "collection in args, e.g. name: Planetoid, args: {name: Cora}"
    )


def _check_args(cls: Any, args: dict[str, Any]) -> None:
    """Refuses arguments that the class does not take, or that a config cannot give."""
    signature = inspect.signature(cls)
    if "root" in args:
        raise ConfigError("graph.source.args.root is not for the config; set the environment variable GKD_DATA instead")
    for key in _NOT_FROM_CONFIG:
        if args.get(key) is not None:
            raise ConfigError(
                f"graph.source.args.{key} would have to be code, which a config never holds; save the "
                "transformed graph with gkd_dist.save_arrays and use graph.source.kind arrays"
            )
    try:
        signature.bind(**({"root": ""} if "root" in signature.parameters else {}), **args)
    except TypeError as error:
        raise ConfigError(f"graph.source.args: {cls.__name__}: {error}; it takes {_parameters(cls)}") from error


def _parameters(cls: Any) -> str:
    """The arguments of a class that a config can give, those without a default marked."""
    hidden = {"root", "force_reload", *_NOT_FROM_CONFIG}
    shown = [p for p in inspect.signature(cls).parameters.values() if p.name not in hidden]
    named = [p.name + (" (required)" if p.default is p.empty else "") for p in shown if p.kind is not p.VAR_KEYWORD]
    return ", ".join(named) if named else "no arguments"


def split_variants(cls: Any, args: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """Arguments to construct the class with, and the split that each construction is (None: all)."""
    parameter = inspect.signature(cls).parameters.get("split")
    if parameter is None or parameter.default != "train" or "split" in args:
        return [(None, args)]
    return [(split, {**args, "split": split}) for split in SPLITS]


# --- construction ----------------------------------------------------------------------------


def _construct(cls: Any, args: dict[str, Any], seed: int, root: Path) -> Any:
    """The data set object; its folder is under ``root`` where the class reads or downloads one."""
    takes_root = "root" in inspect.signature(cls).parameters
    generated = getattr(cls, "download", None) is Dataset.download
    with contextlib.ExitStack() as stack:
        folder = root / cls.__name__
        if takes_root and generated:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gkd-")))
        elif takes_root:
            _log.info("reading %s in %s, downloading what is not there", cls.__name__, folder)
        printed = stack.enter_context(_quiet())
        stack.enter_context(_seeded(seed))
        stack.enter_context(_bounded_sockets())
        dataset = cls.__new__(cls)  # kept where __init__ fails: it says what was looked for
        try:
            dataset.__init__(**({"root": str(folder)} if takes_root else {}), **args)
        except Exception as error:
            raise explain(dataset, error, args, root, printed.getvalue()) from error
    return dataset


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """PyG reports progress on stderr and warns about its own files: collected, logged as debug."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True), contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        yield printed
    for line in printed.getvalue().splitlines():
        _log.debug("torch_geometric: %s", line)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Some classes draw from the global generators: seeded here, and put back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _bounded_sockets() -> Iterator[None]:
    """PyG opens URLs without a time limit; a silent peer would hang the run."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- what went wrong -------------------------------------------------------------------------


def explain(dataset: Any, error: Exception, args: dict[str, Any], root: Path, printed: str) -> GkdError:
    """The error of a failed construction in one sentence, by what the half-made object still says."""
    name = type(dataset).__name__
    what = f"{name} ({', '.join(f'{key}: {value}' for key, value in args.items())})" if args else name
    reason = _reason(error)
    if isinstance(error, ImportError):
        return ConfigError(
            f"{name} needs a Python package that is not installed ({reason}); install it, or choose another data set"
        )
    if getattr(type(dataset), "download", None) is Dataset.download or getattr(dataset, "root", None) is None:
        return ConfigError(f"graph.source.args: {what} was refused ({reason}); it takes {_parameters(type(dataset))}")
    raw_dir, missing = _missing_files(dataset)
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        inside = raw_dir.relative_to(root) if raw_dir.is_relative_to(root) else raw_dir
        return DataError(
            f"the data set {what} is not in {raw_dir} and cannot be downloaded from {_origin(dataset, printed)} "
            f"({reason}); copy its raw files ({shown}) there, or set GKD_DATA to a folder that holds {inside}"
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == 30:
        return DataError(
            f"the data set {what} in {raw_dir} cannot be processed ({reason}), because PyG writes its processed files "
            "beside the raw ones; set GKD_DATA to a copy that can be written"
        )
    return DataError(
        f"the data set {what} in {raw_dir} cannot be read ({reason}); check graph.source.args, "
        f"or delete {raw_dir.parent} so that it is fetched again"
    )


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None)  # urllib wraps the error of the socket
    lines = str(cause if isinstance(cause, Exception) else error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _missing_files(dataset: Any) -> tuple[Path, list[str]]:
    """Folder of the raw files and the names of those that are not there."""
    raw_dir = Path(dataset.raw_dir)
    try:
        paths = [Path(path) for path in dataset.raw_paths]
    except Exception:  # names may be known to the class only after a download
        return raw_dir, [] if raw_dir.exists() and any(raw_dir.iterdir()) else ["all"]
    names = [path.relative_to(raw_dir) if path.is_relative_to(raw_dir) else path for path in paths if not path.exists()]
    return raw_dir, [str(name) for name in names]


def _origin(dataset: Any, printed: str) -> str:
    """The address that PyG tried, as far as it is known."""
    tried = re.findall(r"Downloading (\S+)", printed)
    if tried:
        return tried[-1]
    for key in ("url", "raw_url", "urls"):
        value = getattr(dataset, key, None)
        first = (
            next(iter(value.values() if isinstance(value, dict) else value), None)
            if isinstance(value, dict | list)
            else value
        )
        if isinstance(first, str):
            return first
    return "its publisher"
