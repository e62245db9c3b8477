"""What the database says of reviews, on SQLite and on PostgreSQL."""

from dataclasses import replace

from sqlalchemy import Engine

from config.names import LABELS
from db import queries, reviews
from db.queries import ScoredSubmission
from db.reviews import JudgedText
from db.session import reading, writing
from tests.integration.rows import NOON, prepare, scored


def record(engine: Engine, *rows: ScoredSubmission) -> None:
    with writing(engine) as connection:
        prepare(connection)
        queries.record_decisions(connection, rows)


def review(engine: Engine, submission_id: str, reviewer: str = "mod", **labels: bool) -> None:
    with writing(engine) as connection:
        queries.add_review(
            connection,
            submission_id=submission_id,
            action="hide",
            labels=labels,
            reviewer=reviewer,
            note=None,
            now=NOON,
        )


def test_what_each_reviewer_says_of_each_text(engine: Engine) -> None:
    # Given a text that was submitted twice and is stored once, one that is not stored, and one that nobody reviewed
    record(engine, replace(scored("a1", text="a"), text=None), scored("a2", text="a"), scored("c"))
    record(engine, replace(scored("b", text="b"), text=None))
    # When one reviewer reviews a submission twice, and then its copy, and another one speaks as well
    review(engine, "a1", "ann", toxic=True, insult=True)
    review(engine, "a1", "ann", toxic=True)
    review(engine, "a1", "bob's", threat=False)
    review(engine, "a2", "ann", toxic=False)
    review(engine, "b", "ann", obscene=True)
    # Then each text is one, with the newest words of each
    with reading(engine) as connection:
        found = list(reviews.judged_texts(connection))
    nothing = dict.fromkeys(LABELS)
    assert sorted(found, key=lambda each: each.text is None) == [
        JudgedText("a", {"ann": nothing | {"toxic": False}, "bob's": nothing | {"threat": False}}),
        JudgedText(None, {"ann": nothing | {"obscene": True}}),
    ]
