"""Where the Celery rivals write: one table, by SQLAlchemy's ORM."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from config.names import LABELS

DATABASE_VARIABLE = "RIVAL_DATABASE_URL"


class Base(DeclarativeBase):
    pass


class Moderated(Base):
    __tablename__ = "moderated"

    comment_id: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]
    toxic: Mapped[float]
    severe_toxic: Mapped[float]
    obscene: Mapped[float]
    threat: Mapped[float]
    insult: Mapped[float]
    identity_hate: Mapped[float]
    action: Mapped[str]
    decided_at: Mapped[datetime]


@cache
def sessions() -> sessionmaker[Session]:
    """Of this process: after a fork, never before."""
    return sessionmaker(create_engine(os.environ[DATABASE_VARIABLE]))


def save(comments: Sequence[tuple[str, str]], scores: Sequence[Sequence[float]]) -> None:
    """One transaction for these ids and texts, with their six scores."""
    with sessions().begin() as session:
        session.add_all(
            Moderated(
                comment_id=comment_id,
                text=text,
                **{label: float(score) for label, score in zip(LABELS, row, strict=True)},
                action="hide" if max(row) >= 0.5 else "allow",
                decided_at=datetime.now(UTC),
            )
            for (comment_id, text), row in zip(comments, scores, strict=True)
        )
