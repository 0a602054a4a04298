"""A seal fits its document and no other."""

from __future__ import annotations

import pytest

from gkd_dist.shards.seal import is_sealed, sealed


def test_a_sealed_document_is_sealed() -> None:
    document = sealed({"b": (1, 2.5), 3: None})
    assert document == {"b": [1, 2.5], "3": None, "seal": document["seal"]}
    assert is_sealed(document)


@pytest.mark.parametrize("changes", [{"a": 2}, {"more": 1}, {"seal": None}, {"seal": "0" * 64}, {"a": 1.0}])
def test_any_change_breaks_it(changes: dict[str, object]) -> None:
    assert not is_sealed({**sealed({"a": 1}), **changes})
    assert not is_sealed({})


def test_what_json_has_no_word_for_cannot_be_sealed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        sealed({"a": float("nan")})
