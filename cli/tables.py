"""What commands that read or write files of rows share: their options, bad rows, and where the result is written."""

import csv
import gzip
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from cli.terminal import Problem, say
from config.names import TEXT_COLUMNS
from config.table_files import (
    CSV_ENDINGS,
    JSON_ENDINGS,
    TAB_ENDINGS,
    BadRow,
    Form,
    Row,
    Table,
    TableError,
    as_text,
    listed,
    quoted,
)

STDOUT = "-"
SHOWN_BAD_ROWS = 20

Separator = Annotated[
    str | None,
    typer.Option(metavar="CHARACTER", help="Between the fields of a CSV, or `tab`; by default found in its header."),
]
Encoding = Annotated[
    str | None,
    typer.Option(help="Of a text file, such as cp1252; by default UTF-8, or what its byte-order mark says."),
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and list them at the end.")
]
TextColumn = Annotated[
    str | None, typer.Option(help="Column of the texts; by default comment_text, or text where there is none.")
]


class BadRows:
    """Rows that were left out, counted; the first of them are kept to be listed."""

    def __init__(self, skip: bool) -> None:
        self.count = 0
        self._skip = skip
        self._first: list[BadRow] = []

    def form(self, separator: str | None, encoding: str | None) -> Form:
        return Form(separator, encoding, on_bad_row=self._take if self._skip else None, on_note=say)

    def tell(self) -> None:
        """List them on stderr."""
        for row in self._first:
            say(f"left out: {row}")
        if self.count > len(self._first):
            say(f"and {self.count - len(self._first):,} more")
        if self.count:
            say(f"{self.count:,} row{'' if self.count == 1 else 's'} left out")

    def _take(self, row: BadRow) -> None:
        self.count += 1
        if self.count <= SHOWN_BAD_ROWS:
            self._first.append(row)


def column_of(table: Table, given: str | None, option: str) -> str | None:
    """A column that an option names.

    Raises:
        TableError: the table has none of this name.
    """
    if given is None or given in table.columns:
        return given
    raise TableError(f"{table.name} has no column {given!r}; it has {listed(table.columns)}. See {option}")


def text_column_of(table: Table, given: str | None) -> str:
    """The column of the texts. Raises as `column_of`."""
    if column := column_of(table, given, "--text-column"):
        return column
    if column := next((name for name in TEXT_COLUMNS if name in table.columns), None):
        return column
    # JSON lines without a row have no columns either.
    if table.is_json and not table.columns:
        return TEXT_COLUMNS[0]
    raise TableError(
        f"{table.name} has no column {TEXT_COLUMNS[0]!r}; it has {listed(table.columns)}. Name it with --text-column"
    )


# --- Written ---


class Rows:
    """Rows on their way into a file, in the form that its name asks for, or else in that of the table they come from.

    A regular file takes its name when it is whole. What else there is, as a device or a pipe, is written to.
    """

    def __init__(self, target: str, table: Table, columns: Sequence[str]) -> None:
        ending = Path(target.lower().removesuffix(".gz")).suffix
        if ending == ".parquet":
            raise Problem(f"{target}: Parquet is read and not written; let it end in .csv, .tsv or .jsonl")
        self._target = target
        self._table = table
        self._columns = list(columns)
        self._is_json = ending in JSON_ENDINGS or (table.is_json and ending not in (*CSV_ENDINGS, *TAB_ENDINGS))
        self._separator = "\t" if ending in TAB_ENDINGS else (table.separator or ",")
        if self._separator == "\t" and ending in CSV_ENDINGS:
            self._separator = ","
        self._text: io.TextIOWrapper

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, `add` takes rows.

        Raises:
            Problem: the file cannot be written; then nothing of it is there.
        """
        with ExitStack() as stack:
            with self._named():
                file: Any = stack.enter_context(_opened(self._target))
                if self._target.lower().endswith(".gz"):
                    file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb"))
                # Spreadsheets take a CSV for UTF-8 only with the mark.
                encoding = "utf-8-sig" if self._table.has_mark and not self._is_json else "utf-8"
                self._text = io.TextIOWrapper(file, encoding, newline="")
                stack.callback(self._text.detach)
            yield
            with self._named():
                if not self._is_json:
                    _ = self._csv  # without a row, its header
                stack.close()

    def add(self, row: Row, added: dict[str, str | float | None]) -> None:
        """Write one row, with more columns."""
        with self._named():
            if self._is_json:
                self._text.write(json.dumps(row.values | added, ensure_ascii=False, default=as_text) + "\n")
            elif new := [name for name in row.values if name not in self._columns]:
                self._table.refuse(row, f"has {quoted(new[0])}, which the first row has not; let OUT end in .jsonl")
            else:
                shown = {name: f"{value:.6f}" if isinstance(value, float) else value for name, value in added.items()}
                self._csv.writerow({name: as_text(value) for name, value in (row.values | shown).items()})

    @cached_property
    def _csv(self) -> "csv.DictWriter[str]":
        """Made when it is first needed: what fails before leaves no header behind."""
        writer = csv.DictWriter(self._text, self._columns, delimiter=self._separator, lineterminator="\n")
        writer.writeheader()
        return writer

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise  # the reader of the pipe has closed it
        except OSError as error:
            raise Problem(f"{self._target} cannot be written: {error.strerror or error}") from None


@contextmanager
def _opened(target: str) -> Iterator[BinaryIO]:
    """A file to write to; a regular one is replaced as a whole at the end, or not at all."""
    found = _status(target)
    if target == STDOUT or _is_stdout(found):
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    # What /dev/fd leads to may be a file that others write to as well.
    is_of_system = any(Path(target).absolute().is_relative_to(folder) for folder in ("/dev", "/proc"))
    if found is not None and (is_of_system or not stat.S_ISREG(found.st_mode)):
        with Path(target).open("wb") as file:
            yield file
        return
    # The file that a link leads to, and not the link.
    path = Path(os.path.realpath(target))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as file:
            yield file
        if found is not None:
            temporary.chmod(stat.S_IMODE(found.st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _status(target: str) -> os.stat_result | None:
    try:
        return Path(target).stat()
    except FileNotFoundError:
        return None


def _is_stdout(found: os.stat_result | None) -> bool:
    """Whether it is what this command's standard output is, as /dev/stdout."""
    try:
        return found is not None and os.path.samestat(found, os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False
