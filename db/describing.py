"""Copies the meaning of every table and column from db/tables.py into a PostgreSQL database, for `\\d+` in psql."""

import ast
import inspect
from itertools import pairwise

from sqlalchemy import Connection
from sqlalchemy.schema import SetColumnComment, SetTableComment

from db import tables


def describe(connection: Connection) -> None:
    """Write each docstring as a COMMENT; SQLite has none. Needs the tables' owner, as a migration does."""
    if connection.dialect.name != "postgresql":
        return
    for name, (meaning, columns) in meanings().items():
        table = tables.Base.metadata.tables[name]
        table.comment = meaning
        connection.execute(SetTableComment(table))
        for column, text in columns.items():
            table.c[column].comment = text
            connection.execute(SetColumnComment(table.c[column]))


def meanings() -> dict[str, tuple[str, dict[str, str]]]:
    """By table: what its class' docstring says, and by column what the string below it says, each on one line."""
    found = {}
    for node in ast.parse(inspect.getsource(tables)).body:
        table = getattr(getattr(tables, node.name), "__tablename__", None) if isinstance(node, ast.ClassDef) else None
        if table is not None and isinstance(node, ast.ClassDef):
            found[table] = (_one_line(ast.get_docstring(node) or ""), _columns(node))
    return found


def _columns(model: ast.ClassDef) -> dict[str, str]:
    columns = {}
    for statement, below in pairwise(model.body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=column)), ast.Expr(value=ast.Constant(value=str(text))):
                columns[column] = _one_line(text)
    return columns


def _one_line(text: str) -> str:
    return " ".join(text.split())
