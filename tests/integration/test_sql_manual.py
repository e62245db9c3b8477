"""docs/sql.md: each question's query gives the answer that is described, on SQLite and on PostgreSQL."""

import re
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, text

from config.settings import ROOT
from db.queries import activate, active, add_review, record_decisions
from db.session import reading, writing
from tests.integration.rows import NOON, POLICY, POLICY_VERSION, decide, letter, minutes, prepare, scored

MANUAL = (ROOT / "docs" / "sql.md").read_text(encoding="utf-8")
EXPLAINED = "019aad5e-9d11-7c3e-8a77-0b6d2f9e4410:0"
A_DAY = 24 * 60

ANSWERS: list[list[tuple[Any, ...]]] = [
    [("allow", "mod", "hide", "v2")],
    [("waits-longer", "44", "insult", "the text of waits-longer"), ("waits", "43", "toxic", "the text of waits")],
    [("2026-11-21", "remove", 1), ("2026-11-22", "allow", 1), ("2026-11-22", "hide", 2), ("2026-11-22", "review", 3)],
    [("v1", 2, 1), ("v2", 1, 1)],
    [("bob", 2, 2)],
    [(2,)],
    [(6, 501.25, 3000.0, 1 / 6)],
    [("expired", "news", 2, minutes(5)), ("invalid_comment", None, 1, NOON)],
    [("v1", minutes(-60), "ann", "first", 4, 3), ("v2", minutes(1), "trainer", "better", 3, 3)],
    [("hide", "toxic", 0.9, POLICY_VERSION, POLICY)],
]


def test_each_question_has_the_answer_that_is_described(engine: Engine, database_url: str) -> None:
    # Given a little of everything
    decide(
        database_url,
        letters=[
            letter("a", reason="expired", community="news"),
            letter("b", reason="expired", community="news", received_at=minutes(5)),
            letter("c"),
        ],
    )
    fired: dict[str, Any] = {"fired_label": "toxic", "fired_threshold": 0.9}
    rows = [
        # Decided after the text that replaced it: it had waited, or was retried
        scored("older", community="news", comment_id="42", author="ann", submitted_at=minutes(-A_DAY),
               decided_at=minutes(4)),
        scored(EXPLAINED, community="news", comment_id="42", author="ann", toxic=0.95, action="hide", **fired,
               model_version="v2", decided_at=minutes(2)),
        scored("waits", comment_id="43", author="ann", toxic=0.85, action="review", fired_label="toxic",
               community="news", decided_at=minutes(3), model_version="v2"),
        scored("waits-longer", comment_id="44", author="ann", action="review", fired_label="insult",
               decided_at=minutes(2), model_version="v2"),
        scored("looked-at", comment_id="45", author="bob", action="review", decided_at=minutes(1), queue_ms=3000.0),
        scored("hidden", comment_id="46", author="bob", community="news", toxic=0.9, action="hide",
               decided_at=minutes(1)),
        scored("removed", comment_id="47", action="remove", decided_at=minutes(-A_DAY), queue_ms=7.5),
    ]  # fmt: skip
    with writing(engine) as connection:
        prepare(connection, "v1", "v2")
        activate(connection, version="v1", instead_of=None, by="ann", reason="first", now=minutes(-60))
        activate(connection, version="v2", instead_of=active(connection), by="trainer", reason="better", now=minutes(1))
        record_decisions(connection, rows)
        for submission_id, action in ((EXPLAINED, "remove"), (EXPLAINED, "allow"), ("looked-at", "hide"),
                                      ("hidden", "hide")):  # fmt: skip
            add_review(
                connection, submission_id=submission_id, action=action, labels={}, reviewer="mod", note=None,
                now=minutes(9),
            )  # fmt: skip
    # When each question is asked
    queries = re.findall(r"^## (\d+)\. .*?```sql\n(.*?)```", MANUAL, re.MULTILINE | re.DOTALL)
    assert [number for number, _ in queries] == [f"{number}" for number in range(1, 11)]
    with reading(engine) as connection:
        answers = [[tuple(map(_plain, row)) for row in connection.execute(text(query))] for _, query in queries]
    # Then the answers are these
    for (number, _), answer, expected in zip(queries, answers, ANSWERS, strict=True):
        assert answer == [tuple(map(_plain, row)) for row in expected], f"question {number}"


def _plain(value: Any) -> Any:
    """What both databases give alike: of a time its first part in UTC, of a number its first digits."""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:.*", value):
        return value[:16]
    if isinstance(value, str) or value is None:
        return value
    return round(float(value), 6) if not hasattr(value, "isoformat") else value.isoformat()
