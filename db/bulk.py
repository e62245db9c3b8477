"""Many rows in one go, at a tenth of what a parameter for each value costs. Owns how they travel to each database.

PostgreSQL takes them as one JSON parameter, SQLite as the tuples that SQLAlchemy would send.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from operator import attrgetter
from typing import Any

import orjson
from sqlalchemy import CTE, ColumnElement, bindparam, column, func, insert, select
from sqlalchemy.dialects import sqlite

from db.tables import Base


def json_parameter(rows: Sequence[Any]) -> Any:
    """Dataclasses as the parameter `rows` of a statement with `given_rows`."""
    from psycopg.types.json import Json  # here: what runs on SQLite does without the driver

    return Json(rows, dumps=_as_json)


def _as_json(rows: Sequence[Any]) -> bytes:
    try:
        return orjson.dumps(rows)
    except TypeError:
        # An integer in a producer's context may have more than 64 bits.
        return json.dumps([asdict(row) for row in rows], default=datetime.isoformat).encode()


def given_rows(kind: type[Any], *tables: type[Base]) -> CTE:
    """The parameter `rows`, a JSON list of such dataclasses, as a relation with a column for each field.

    Args:
        tables: whose columns of the same names give the types.
    """
    types = {each.name: each.type for table in tables for each in table.__table__.c}
    columns = [column(field.name, types[field.name]) for field in fields(kind)]
    rows = func.json_to_recordset(bindparam("rows")).table_valued(*columns).render_derived("r", with_types=True)
    return select(rows).cte("given")


def sqlite_insert(
    kind: type[Any], table: type[Base], **computed: Any
) -> tuple[str, Callable[[Sequence[Any]], list[tuple[Any, ...]]]]:
    """An INSERT of such dataclasses, and what makes its parameters: a column at a time and not a value.

    Args:
        computed: columns that SQLite fills itself, each by an expression without parameters.
    """
    dialect = sqlite.dialect()
    columns = [column for column in table.__table__.c if hasattr(kind, column.name)]
    get = attrgetter(*(column.name for column in columns))
    processors = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]

    def values(rows: Sequence[Any]) -> list[tuple[Any, ...]]:
        by_column = zip(*map(get, rows), strict=True)
        sent = (map(process, given) if process else given for process, given in zip(processors, by_column, strict=True))
        return list(zip(*sent, strict=True))

    given = [column.name for column in columns]
    sql = insert(table).values(computed).compile(dialect=dialect, column_keys=[*given, *computed])
    return str(sql), values


def in_json_list(value: ColumnElement[str]) -> ColumnElement[bool]:
    """On SQLite: whether the parameter `ids`, a JSON list of any length, holds the value."""
    return value.in_(select(func.json_each(bindparam("ids")).table_valued("value")))
