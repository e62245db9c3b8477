"""What the modules with SQL share: how rows are written once, read as plain values, and asked for in bounded lists."""

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from sqlalchemy import Connection, CursorResult, RowMapping, Select, insert
from sqlalchemy.dialects import postgresql, sqlite

from config.names import LABELS
from db.tables import Base

IN_LIST = 500
"""Ids in one IN (...): each database bounds the parameters of a statement."""
STREAM_ROWS = 500
"""Rows held in memory of a streamed answer."""

AnyRow = TypeVar("AnyRow")


class WithScores:
    """A row with a column for each label."""

    __slots__ = ()

    @property
    def scores(self) -> dict[str, float]:
        """Label to probability, in the order of `config.names.LABELS`."""
        return {label: getattr(self, label) for label in LABELS}


def insert_if_absent(connection: Connection, table: type[Base]) -> Any:
    """An INSERT that passes over rows whose primary key is there already."""
    dialect: Any = {"postgresql": postgresql, "sqlite": sqlite}[connection.dialect.name]
    return dialect.insert(table).on_conflict_do_nothing(index_elements=list(table.__table__.primary_key))


def insert_one(connection: Connection, table: type[Base], row: dict[str, Any]) -> int:
    """Insert a row; the number that the database gave it is returned."""
    inserted: CursorResult[Any] = connection.execute(insert(table).values(row))
    assert inserted.inserted_primary_key is not None
    return int(inserted.inserted_primary_key[0])


def chunks(ids: Collection[str]) -> Iterator[list[str]]:
    """The ids in lists, each short enough for one IN (...)."""
    listed = list(ids)
    return (listed[start : start + IN_LIST] for start in range(0, len(listed), IN_LIST))


def first(connection: Connection, statement: Select[Any], kind: type[AnyRow]) -> AnyRow | None:
    """The first row of an answer, as `kind`."""
    row = connection.execute(statement).mappings().first()
    return None if row is None else kind(**row)


def every(connection: Connection, statement: Select[Any], kind: type[AnyRow]) -> list[AnyRow]:
    """All rows of an answer, as `kind`."""
    return [kind(**row) for row in connection.execute(statement).mappings()]


def streamed(connection: Connection, statement: Select[Any]) -> Iterator[RowMapping]:
    """The rows of an answer, one after the other, while the connection is open."""
    # Closed with the iterator: an answer that is not read to its end holds a cursor on the server.
    with connection.execute(statement, execution_options={"yield_per": STREAM_ROWS}) as rows:
        yield from rows.mappings()
