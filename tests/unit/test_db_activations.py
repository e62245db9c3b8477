"""The way back: what a rollback activates, from the history alone."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from db.activations import AlreadyRolledBack, NothingToRollBack, choose_return, told, way_back
from db.queries import ActivationRow

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def row(number: int, version: str) -> ActivationRow:
    said: dict[str, Any] = {"activated_at": NOON, "activated_by": "ann", "reason": "why", "after_position": None}
    return ActivationRow(activation_id=number, version=version, **said)


@pytest.mark.parametrize(
    ("history", "way"),
    [
        ("", ""),
        ("AB", "AB"),
        ("ABB", "AB"),
        ("ABCB", "AB"),
        ("ABCBA", "A"),
        ("ABCBD", "ABD"),
        ("ABCBDB", "AB"),
        ("ABAC", "AC"),
        ("ABCBCB", "AB"),
    ],
)
def test_the_way_back_never_leads_to_what_was_gone_back_from(history: str, way: str) -> None:
    assert "".join(way_back(history)) == way


@pytest.mark.parametrize(
    ("history", "to", "target"),
    [
        ("ABC", None, "B"),
        ("ABC", "A", "A"),
        ("ABCB", None, AlreadyRolledBack),
        ("ABCBB", None, AlreadyRolledBack),
        ("ABCB", "A", "A"),
        ("ABCB", "C", "C"),
        ("ABCBD", None, "B"),
        ("A", None, NothingToRollBack),
        ("", None, NothingToRollBack),
        ("AB", "B", NothingToRollBack),
        ("AB", "Z", NothingToRollBack),
    ],
)
def test_what_a_rollback_activates(history: str, to: str | None, target: str | type[Exception]) -> None:
    rows = [row(number, version) for number, version in enumerate(history)]
    way = way_back(history)
    earlier = way[-2] if len(way) > 1 else None
    if isinstance(target, str):
        assert choose_return(rows, earlier, to, NOON) == target
    else:
        with pytest.raises(target):
            choose_return(rows, earlier, to, NOON)


@pytest.mark.parametrize(
    ("seconds", "age"), [(-5, "0 s"), (20, "20 s"), (150, "2 min"), (7_300, "2 h"), (3e5, "3 days")]
)
def test_an_activation_is_told_by_its_age(seconds: float, age: str) -> None:
    said = told(row(1, "v2"), NOON + timedelta(seconds=seconds))
    assert age in said and "v2" in said and "ann" in said and "why" in said
