"""Files of comments to submit: which column is which field, and what names a row so that it is submitted once."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from api_client.messages import InvalidComment, checked_form
from cli.tables import column_of, text_column_of
from config.comment import Comment
from config.names import DEFAULT_COMMUNITY, TEXT_COLUMNS
from config.table_files import Row, Table

FIELDS = tuple(name for name in Comment.model_fields if name != "text")
ROW_KEY_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Fields:
    """Which column gives which field of a comment.

    Attributes:
        columns: by field; JSON lines have their other names as they are.
        unread: columns that give none.
    """

    columns: Mapping[str, str]
    unread: list[str]


def find_fields(
    table: Table, *, text_column: str | None = None, id_column: str | None = None, key_column: str | None = None
) -> Fields:
    """The columns of a table that are fields of a comment by their names, or by the options.

    Raises:
        TableError: the table has no text, or not a column that an option names.
    """
    columns = {name: name for name in FIELDS if name in table.columns}
    columns["text"] = text_column_of(table, text_column)
    if named := column_of(table, id_column, "--id-column"):
        columns["id"] = named
    if named := column_of(table, key_column, "--key-column"):
        columns["idempotency_key"] = named
    return Fields(columns, [name for name in table.columns if name not in columns.values()])


def read_comments(
    table: Table, fields: Fields, *, community: str | None, durable: bool, again: bool
) -> Iterator[dict[str, Any]]:
    """The comments of a file, checked; a bad row is refused or left out, as the table's form says.

    Args:
        community: of rows that name none.
        again: rows without an idempotency key get none: they are new submissions however often they were sent.
    """
    for row in table:
        comment = _comment_of(row, fields, is_json=table.is_json)
        if comment.get("community") is None and community is not None:
            comment["community"] = community
        try:
            form = checked_form(comment, durable)
        except InvalidComment as error:
            table.refuse(row, str(error))
            continue
        if "idempotency_key" not in form and not again:
            form["idempotency_key"] = row_key(form, row.number)
        yield form


def row_key(comment: Mapping[str, Any], number: int) -> str:
    """What names a row that has no key of its own: the same row of the same file has the same name.

    Args:
        number: of the row in its file, so that two rows with the same text are two comments.
    """
    parts = [comment.get("community", DEFAULT_COMMUNITY), comment.get("id"), number, comment["text"]]
    return f"row-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:ROW_KEY_DIGITS]}"


def _comment_of(row: Row, fields: Fields, *, is_json: bool) -> dict[str, Any]:
    columns = dict(fields.columns)
    if is_json and columns["text"] not in row.values:
        # A line may have other names than the first.
        columns["text"] = next((name for name in TEXT_COLUMNS if name in row.values), columns["text"])
    comment = {field: _value(field, row.values[name]) for field, name in columns.items() if name in row.values}
    if is_json:
        # What is no field is refused, as from any other producer.
        comment |= {name: value for name, value in row.values.items() if name not in columns.values()}
    return comment


def _value(field: str, value: Any) -> Any:
    """A cell as the contract takes it; what cannot be read as such is left for the contract to refuse."""
    if value == "" and field != "text":
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):
        if field == "store_text":
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
        if field in ("context", "v"):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                return value
    return value
