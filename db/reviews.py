"""Every question asked about people's reviews: who said what of which text, and which decisions wait for a word.

Like `db.queries`: functions take a connection and never commit. A text is known by its hash: however often it was
submitted, it is one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from sqlalchemy import Connection, select

from config.names import LABELS
from db.rows import streamed
from db.tables import Review, Submission

Labels = Mapping[str, bool | None]
"""All six; None where the reviewer did not say."""


@dataclass(frozen=True, slots=True)
class JudgedText:
    """A text that somebody reviewed, and what each of them says of it now."""

    text: str | None
    """None where it was erased, or never stored."""
    said: Mapping[str, Labels]
    """By reviewer: the newest review of each, whichever submission of the text it was of."""


def judged_texts(connection: Connection) -> Iterator[JudgedText]:
    """Stream every reviewed text, in the order of their hashes, so that the same reviews give the same order."""
    labels = [Review.__table__.c[label] for label in LABELS]
    statement = (
        select(Submission.text_sha256, Submission.text, Review.reviewer, *labels)
        .join(Submission, Submission.submission_id == Review.submission_id)
        .order_by(Submission.text_sha256, Review.review_id)
    )
    for _, rows in groupby(streamed(connection, statement), key=itemgetter("text_sha256")):
        text, said = None, {}
        for row in rows:
            text = text or row["text"]  # one copy may have been erased, and another not
            said[row["reviewer"]] = {label: row[label] for label in LABELS}
        yield JudgedText(text, said)
