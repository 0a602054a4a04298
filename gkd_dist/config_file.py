"""YAML files and dotted overrides become one checked `Config`, and every mistake one clear line.

::

    configs/x.yaml:14: distill.num_worker: unknown key; did you mean num_workers?
    override distill.lr=fast: expected a number > 0, got "fast"

A file may extend one other (``extends: base.yaml``, relative to it): mappings are merged, lists and
values replaced; overrides come last. Where a later source changes the ``kind`` of a section that
comes in several kinds (``graph.source``, ``graph.split``, a loss), keys of the old kind that the new
one does not know are dropped with one log line if an earlier file gave them; what the same source
or an override gives is never dropped. ``${env:NAME,default}`` stands for an environment variable.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gkd_dist import config_tree as tree
from gkd_dist.config import Config
from gkd_dist.config_fields import FieldType
from gkd_dist.config_problems import explain, show
from gkd_dist.errors import ConfigError

logger = logging.getLogger(__name__)

# --- in --------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Config of the YAML file ``path`` with ``overrides`` like ``distill.num_workers=4`` applied in order.

    Raises ConfigError with one line per problem: file:line or the override, the key, what was
    found and what was expected.
    """
    chain = _read_chain(Path(path))
    root = chain[0]
    for node in chain[1:]:
        root = tree.merge(root, node)
    return _check(root, overrides, layer=len(chain))


def parse_config(text: str, source: str = "config", overrides: Sequence[str] = ()) -> Config:
    """Config of YAML text, e.g. of the ``config.yaml`` in a run; ``source`` is its name in messages.

    Same rules as `load_config`, but text has no folder and cannot extend a file.
    """
    root = _mapping(tree.parse_yaml(text, source), source)
    if "extends" in root.value:
        where = root.value["extends"].origin.text
        raise ConfigError(f"{where}: extends: only files can extend a file; use the resolved configuration")
    return _check(root, overrides, layer=1)


def _read_chain(path: Path) -> list[tree.Node]:
    """Trees of ``path`` and of all that it extends, the base first."""
    files, nodes = [path], []
    where = ""
    while True:
        name = str(files[-1])
        node = _mapping(tree.parse_yaml(_read_text(files[-1], where), name), name)
        parent = node.value.pop("extends", None)
        nodes.append(node)
        if parent is None:
            break
        where = f"{parent.origin.text}: extends: "
        if not isinstance(parent.value, str):
            raise ConfigError(f"{where}expected the name of one file, got {show(parent.plain())}")
        files.append(files[-1].parent / parent.value)
        if files[-1].resolve() in {file.resolve() for file in files[:-1]}:
            raise ConfigError(f"{where}files extend each other in a circle: {' -> '.join(map(str, files))}")
    nodes.reverse()
    return [_on_layer(node, layer) for layer, node in enumerate(nodes)]


def _read_text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{where}{path}: no such file (from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}{path}: cannot be read as UTF-8 text: {error}") from error


def _mapping(node: tree.Node, source: str) -> tree.Node:
    if not isinstance(node.value, dict):
        found = "nothing" if node.value is None else show(node.plain())
        raise ConfigError(f"{source}: expected a mapping of sections (run, graph, teacher, ...), got {found}")
    return node


def _on_layer(node: tree.Node, layer: int) -> tree.Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _on_layer(child, layer) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_on_layer(child, layer) for child in value]
    return tree.Node(value, replace(node.origin, layer=layer))


def _check(root: tree.Node, overrides: Sequence[str], layer: int) -> Config:
    for override in overrides:
        root = tree.apply_override(root, override, layer)
    root = _drop_keys_of_other_kinds(root, FieldType(Config), ())
    try:
        return Config.model_validate(root.plain())
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, root))) from None


def _drop_keys_of_other_kinds(node: tree.Node, known: FieldType | None, path: tree.Path) -> tree.Node:
    if known is None or not isinstance(node.value, dict | list):
        return node
    if isinstance(node.value, list):
        items = enumerate(node.value)
        return replace(node, value=[_drop_keys_of_other_kinds(item, known.below(i), (*path, i)) for i, item in items])
    kind = node.value.get("kind")
    section = known.section(kind.value if kind else None)
    children = node.value
    if kind is not None and section is not None and len(known.sections()) > 1:
        stale = [k for k, v in children.items() if k not in section.model_fields and v.origin.layer < kind.origin.layer]
        if stale:
            where, old = kind.origin.text, children[stale[0]].origin.text
            what = tree.dotted((*path, "kind"))
            logger.info("%s: %s is now %s; dropped %s of %s", where, what, kind.value, ", ".join(stale), old)
        children = {key: child for key, child in children.items() if key not in stale}
    return replace(
        node,
        value={
            key: _drop_keys_of_other_kinds(child, known.below(key, kind.value if kind else None), (*path, key))
            for key, child in children.items()
        },
    )


# --- out -------------------------------------------------------------------------------------


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out; `parse_config` reads it back equal."""
    # of several teachers the first stands under `teacher` too: written once, so that overrides may change it
    return tree.dump_yaml(config.model_dump(mode="json", exclude={"teacher" if config.teachers else "teachers"}))


def config_schema() -> dict[str, Any]:
    """JSON schema of a config file, for completion in editors.

    Nothing but ``kind`` is required in it, because a file may get its keys from the one it extends;
    `load_config` demands what is missing in the end.
    """
    schema = _optional(Config.model_json_schema())
    extends = {"type": "string", "description": "file that this one is laid over, relative to it"}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _optional(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_optional(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _optional(value) for key, value in schema.items()}
    if isinstance(changed.get("required"), list):
        changed["required"] = [name for name in changed["required"] if name == "kind"]
    return changed


def config_fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a section, or of lists and mappings of sections and values.

    Equal settings have equal fingerprints, whether they were written out or are defaults.
    """
    text = json.dumps(value, default=_jsonable, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"cannot fingerprint a {type(value).__name__}")
