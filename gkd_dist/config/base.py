"""The base of all sections, and the numbers that they are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _no_bool(value: Any) -> Any:
    """Stops ``epochs: true`` from meaning 1, as it does in Python."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


NotBool = BeforeValidator(_no_bool)  # outermost, so that bounds reach the JSON schema
Integer = Annotated[int, NotBool]
Number = Annotated[float, Field(allow_inf_nan=False), NotBool]
Positive = Annotated[int, Field(gt=0), NotBool]
NonNegative = Annotated[int, Field(ge=0), NotBool]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), NotBool]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), NotBool]
Probability = Annotated[float, Field(ge=0, lt=1), NotBool]
Fraction = Annotated[float, Field(gt=0, lt=1), NotBool]
Sigma = PositiveFloat | Literal["median"]


class ErrorAt(ValueError):
    """A `ValueError` of a validator about a place ``below`` the field: the steps that lead there."""

    def __init__(self, below: tuple[str | int, ...], sentence: str) -> None:
        super().__init__(sentence)
        self.below = below


def near_miss(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown ``name``: the nearest of the ``known`` ones, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"


def unknown_name(name: str, known: Iterable[str], where: str) -> str:
    """What is wrong with ``name`` and what could be meant: ``where`` has the names ``known``."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where} has no {name!r} (it has {', '.join(choices) or 'none'}){hint}"
