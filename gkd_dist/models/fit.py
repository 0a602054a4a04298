"""Do these weights fit this model? If not, one sentence says what differs and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from gkd_dist.errors import ModelError

_SHOWN = 3  # names per kind of difference


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """``load_state_dict`` with one sentence instead of a page where the state does not fit.

    Raises `ModelError` with names and shapes of what is missing, unknown or of another shape; the
    model is then as it was.
    """
    own = model.state_dict()
    missing = {name: shape_of(own[name]) for name in sorted(own.keys() - state.keys())}
    unknown = {name: shape_of(state[name]) for name in sorted(state.keys() - own.keys())}
    other = {
        name: f"{shape_of(state[name])}, needed {shape_of(value)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    }
    found = [
        _list(missing, "missing"),
        _list(unknown, "unknown"),
        _list(other, "of another shape"),
    ]
    if any(found):
        raise ModelError(
            f"the weights at {where} do not fit the model: {', '.join(part for part in found if part)}; "
            f"{_remedy(own, state, missing)}"
        )
    model.load_state_dict(dict(state))


def shape_of(value: Tensor) -> str:
    """``[2, 3]``."""
    return str(list(value.shape))


def _list(names: Mapping[str, str], what: str) -> str:
    if not names:
        return ""
    shown = ", ".join(f"{name} {shape}" for name, shape in list(names.items())[:_SHOWN])
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({shown}{more})"


def _remedy(own: Mapping[str, Tensor], state: Mapping[str, Tensor], missing: Mapping[str, str]) -> str:
    prefix = extra_prefix(own, state)
    if prefix:
        return f"its names begin with {prefix!r}: save the state_dict of that inner module, or remove the prefix"
    prefix = extra_prefix(state, own)
    if prefix:
        return f"names of the model begin with {prefix!r}: save the state_dict of the outer module, or add the prefix"
    if missing or not own:
        return "correct model kind, layers, norm or args to what was trained"
    return "correct the model's hidden, heads and layers, or use data of the same width"


def extra_prefix(short: Collection[str], long: Collection[str]) -> str:
    """What most names of ``short`` have before them in ``long``, like ``model.``; empty where nothing is."""
    prefixes: Counter[str] = Counter()
    for name in short:
        prefixes.update({other[: -len(name)] for other in long if other.endswith(f".{name}")})
    best, count = max(prefixes.items(), key=lambda item: item[1], default=("", 0))
    return best if 2 * count > len(short) else ""
