"""YAML as a tree that remembers where every value was written.

A `Node` is a value and its `Origin`: the file and line, or the override, that set it. Trees are
read from text, laid over each other and changed by overrides without knowing what the keys mean;
`config_file.py` gives them meaning.

Scalars follow YAML 1.2: ``1e-3`` is a number, ``on`` and ``no`` are text, ``1:30`` is not sexagesimal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from gkd_dist.errors import ConfigError

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was written. ``layer`` orders the sources: a higher one was laid over a lower one."""

    text: str  # "configs/cora.yaml:14" or "override distill.lr=0.1"
    layer: int
    override: Path | None = None  # the path that an override set; None for files


@dataclass(frozen=True)
class Node:
    """``value`` is a dict of nodes by key, a list of nodes, or a scalar."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without origins, as ``yaml.safe_load`` would give it."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def origin_at(self, path: Path) -> Origin:
        """Origin of the value at ``path``, or of the deepest one on the way that exists."""
        node = self
        for key in path:
            child = node._child(key)
            if child is None:
                break
            node = child
        return node.origin

    def _child(self, key: str | int) -> Node | None:
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            child: Node = self.value[key]
            return child
        return None


# --- reading ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, which are those that people expect."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def parse_yaml(text: str, source: str, layer: int = 0, override: Path | None = None) -> Node:
    """Tree of one YAML document.

    ``source`` is the name in messages; with ``override`` every origin is that text without a line.
    Raises ConfigError: not YAML, a key twice in a mapping, a tag, an alias into itself, or
    ``${env:NAME}`` of a variable that is not set.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Node(None, Origin(source, layer, override))
        return _Builder(loader, source, layer, override).build(root, Origin(source, layer, override), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if mark is None or override is not None else f"{source}:{mark.line + 1}"
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{source}: not valid YAML: {error}") from error


@dataclass(frozen=True)
class _Builder:
    loader: _Loader
    source: str
    layer: int
    override: Path | None

    def build(self, node: yaml.Node, origin: Origin, parents: tuple[int, ...]) -> Node:
        """Node of a YAML node whose key was written at ``origin``; ``parents`` are ids of those around it."""
        if id(node) in parents:
            raise ConfigError(f"{origin.text}: an alias points into itself")
        parents = (*parents, id(node))
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, origin), origin)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise ConfigError(f"{self._origin(node).text}: tag {node.tag} is not allowed; write plain values")
        if isinstance(node, yaml.SequenceNode):
            return Node([self.build(item, self._origin(item), parents) for item in node.value], origin)
        assert isinstance(node, yaml.MappingNode)
        self._reject_duplicates(node)
        self.loader.flatten_mapping(node)  # `<<: *anchor`
        children = {}
        for key, value in node.value:
            children[self._key(key)] = self.build(value, self._origin(key), parents)
        return Node(children, origin)

    def _origin(self, node: yaml.Node) -> Origin:
        where = self.source if self.override is not None else f"{self.source}:{node.start_mark.line + 1}"
        return Origin(where, self.layer, self.override)

    def _key(self, node: yaml.Node) -> str:
        key = self.loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise ConfigError(
                f"{self._origin(node).text}: a key must be text (got {getattr(node, 'value', node)}); quote it"
            )
        return key

    def _reject_duplicates(self, node: yaml.MappingNode) -> None:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self._key(key)
            if name in first:
                raise ConfigError(
                    f"{self._origin(key).text}: {name}: given twice (first on line "
                    f"{first[name].start_mark.line + 1}); keep one"
                )
            first[name] = key

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Any:
        if "${" not in node.value:
            return self.loader.construct_object(node)
        text = interpolate_env(node.value, origin.text, os.environ)
        whole = re.fullmatch(r"\$\{[^}]*\}", node.value) is not None
        # An unquoted value that is nothing but a variable gets the type it would have if written out.
        if whole and node.style is None:
            tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))
            return self.loader.construct_object(yaml.ScalarNode(tag, text, node.start_mark, node.end_mark))
        return text


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, the same for every reader of YAML 1.1 or 1.2."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def interpolate_env(text: str, where: str, environ: Mapping[str, str]) -> str:
    """``text`` with ``${env:NAME}`` and ``${env:NAME,default}`` replaced."""

    def value(match: re.Match[str]) -> str:
        found = re.fullmatch(r"env:([A-Za-z_][A-Za-z0-9_]*)(?:,(.*))?", match.group(1))
        if found is None:
            raise ConfigError(f"{where}: expected ${{env:NAME}} or ${{env:NAME,default}}, got {match.group(0)}")
        name, default = found.groups()
        if name not in environ and default is None:
            raise ConfigError(
                f"{where}: environment variable {name} is not set; set it or write ${{env:{name},default}}"
            )
        return environ.get(name, default or "")

    return re.sub(r"\$\{([^}]*)\}", value, text)


# --- laying over -----------------------------------------------------------------------------


def merge(base: Node, top: Node) -> Node:
    """``top`` laid over ``base``: mappings are merged key by key, everything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for key, child in top.value.items():
        merged[key] = _lay(key, merged.get(key), child)
    return Node(merged, top.origin)


def _lay(key: str, below: Node | None, child: Node) -> Node:
    if below is None:
        return child
    if key == "kind" and below.value == child.value:
        return below  # restated, not changed: the origin says since when the section has this kind
    return merge(below, child)


def apply_override(root: Node, override: str, layer: int) -> Node:
    """``root`` with one ``dotted.key=value`` applied; the value is YAML, nothing after ``=`` means null.

    Missing mappings on the way are made; a list takes an index, and its length to append an item.
    Raises ConfigError where the text is no override or the path cannot exist.
    """
    key, equals, text = override.partition("=")
    path: Path = tuple(int(step) if step.isdecimal() else step for step in key.strip().split("."))
    if not equals or not all(step != "" for step in path):
        raise ConfigError(f"override {override}: expected dotted.key=value, e.g. distill.num_workers=4")
    value = parse_yaml(text, f"override {override}", layer, path)
    return _assign(root, path, value, ())


def _assign(node: Node | None, path: Path, value: Node, done: Path) -> Node:
    if not path:
        return value if node is None else merge(node, value)
    step, rest = path[0], path[1:]
    if node is None or node.value is None:
        node = Node({}, value.origin)
    below = (*done, step)
    if isinstance(node.value, dict):
        name = str(step)
        child = node.value.get(name)
        changed = _assign(child, rest, value, below) if rest else _lay(name, child, value)
        return replace(node, value={**node.value, name: changed})
    place = dotted(done) or "the configuration"
    if not isinstance(node.value, list):
        raise ConfigError(f"{value.origin.text}: {place} is a single value ({node.value}) and has no key {step}")
    num_items = len(node.value)
    if not isinstance(step, int) or step > num_items:
        raise ConfigError(
            f"{value.origin.text}: {place} is a list of {num_items}; expected an index 0..{num_items - 1}, "
            f"or {num_items} to append, got {step}"
        )
    items: list[Node | None] = [*node.value, None]
    changed = _assign(items[step], rest, value, below)
    return replace(node, value=[*node.value[:step], changed, *node.value[step + 1 :]])


def dotted(path: Sequence[str | int]) -> str:
    """``("losses", 1, "weight")`` as ``losses.1.weight``."""
    return ".".join(str(step) for step in path)
