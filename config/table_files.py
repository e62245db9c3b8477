"""Rows of the files that people bring: CSV of any separator and encoding, JSON lines, Parquet; packed or not.

Reads row by row, so that a file may be larger than memory. A row that does not fit is refused by its line: it is never
shifted, cut or filled up. Which columns mean what is the callers' part.
"""

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

STDIN = "-"
SEPARATORS = (",", ";", "\t", "|")
"""Those that are found in a header; the first counts where two split it into equally many names."""
MAX_ROW_CHARS = 16_777_216
"""Bounds the memory, and how far an open quote can reach."""
ROWS_PER_BATCH = 1_024
"""Of Parquet."""
CSV_ENDINGS, TAB_ENDINGS, JSON_ENDINGS = (".csv",), (".tsv", ".tab"), (".jsonl", ".ndjson")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
UNDECODED = re.compile("[\udc80-\udcff]")
"""What the error handler "surrogateescape" makes of a byte that is no text in the file's encoding."""
TELLING_NAME = re.compile(r"[\w.-]{1,40}")
"""What may be shown of a column's name or a row's id: in a file without a header the names are its first comment."""
SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""The first line by which spreadsheets name the separator."""
DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, UnicodeError)
"""What the layers below raise where a file cannot be read. Of RuntimeError: an archive that needs a password."""


class TableError(Exception):
    """A file that cannot be read on; the message names it, and the line where there is one, and quotes no text."""


class BadRow(TableError):
    """A row that cannot be used. Those after it can."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a file is to be read, where that is not left to be found.

    Attributes:
        separator: between the fields of a CSV: one character, or "tab".
        encoding: as Python names it.
        on_bad_row: takes a row that cannot be used, which is then left out; without it the row's error is raised.
        on_note: takes what was found about the file, in words, where that is not the usual.
    """

    separator: str | None = None
    encoding: str | None = None
    on_bad_row: Callable[[BadRow], object] | None = None
    on_note: Callable[[str], object] = lambda note: None

    def refuse(self, message: str) -> None:
        """Leave out a row.

        Raises:
            BadRow: rows are not to be left out.
        """
        if self.on_bad_row is None:
            raise BadRow(message)
        self.on_bad_row(BadRow(message))


AS_FOUND = Form()


class Row(NamedTuple):
    """A row.

    Attributes:
        number: counted from 1, with the bad ones and without the header.
        place: its first line in a text file, counted from 1; its number in Parquet.
        values: by column; of a CSV all are text.
    """

    number: int
    place: int
    values: dict[str, Any]


class Table:
    """An open file of rows, to be iterated over once.

    Attributes:
        name: what messages call it.
        columns: their names; of JSON lines those of the first row.
        is_json: rows may have other names than the first.
        separator: of a CSV.
        has_mark: it begins with a byte-order mark, as spreadsheets expect.
        size: in bytes as stored; None where it is not known, as of a pipe.
    """

    def __init__(self, name: str, form: Form) -> None:
        self.name = name
        self.columns: list[str] = []
        self.is_json = False
        self.separator: str | None = None
        self.has_mark = False
        self.size: int | None = None
        self._form = form
        self._unit = "line"
        self._rows: Iterator[Row] = iter(())
        self._stored: BinaryIO | None = None
        self._encoding = ""

    def __iter__(self) -> Iterator[Row]:
        with _damage_named(self.name):
            yield from self._rows

    def place(self, row: Row) -> str:
        """Where a row stands in the file, for messages."""
        return f"{self._unit} {row.place}"

    def refuse(self, row: Row, why: str) -> None:
        """Leave out a row that cannot be used, or raise `BadRow`, as the form says."""
        self._refuse(row.place, why)

    def bytes_read(self) -> int:
        """How much of the stored `size` was read."""
        return 0 if self._stored is None or self.size is None else self._stored.tell()

    def _where(self, place: int) -> str:
        return f"{self.name}, {self._unit} {place}"

    def _refuse(self, place: int, why: str) -> None:
        self._form.refuse(f"{self._where(place)}: {why}")

    # --- Bytes ---

    def _open(self, source: str, stack: ExitStack) -> None:
        file = stack.enter_context(_stored(source))
        self._stored = file
        try:
            status = os.fstat(file.fileno())
            self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        except OSError:  # a test's standard input
            self.size = None
        head = file.peek(4)[:4]
        if head.startswith(b"\x1f\x8b"):
            file = io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=file)))
            head = file.peek(4)[:4]
        elif head == b"PK\x03\x04":
            file = stack.enter_context(_only_member(self.name, file, stack))
            head = file.peek(4)[:4]
        if head == b"PAR1":
            self._open_parquet(file)
        else:
            self._open_text(source, file, head, stack)

    def _open_parquet(self, file: io.BufferedReader) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ModuleNotFoundError:
            raise TableError(
                f"{self.name} is Parquet, which needs the extra `parquet`: pip install pyarrow. Or bring it as CSV"
            ) from None
        if not file.seekable():
            raise TableError(f"{self.name} is Parquet, which cannot be read from a pipe: name the file itself")
        self._unit = "row"
        try:
            opened = parquet.ParquetFile(file)
        except (ArrowException, OSError) as error:
            raise TableError(f"{self.name} cannot be read as Parquet: {error}") from None
        self.columns = _checked_names(self.name, opened.schema_arrow.names)

        def rows() -> Iterator[Row]:
            number = 0
            try:
                for batch in opened.iter_batches(batch_size=ROWS_PER_BATCH):
                    for values in batch.to_pylist():
                        number += 1
                        try:
                            yield Row(number, number, {name: _decoded(value) for name, value in values.items()})
                        except UnicodeDecodeError as error:
                            self._refuse(number, f"is not UTF-8, by its byte 0x{error.object[error.start]:02x}")
            except ArrowException as error:
                raise TableError(f"{self._where(number + 1)}: cannot be read as Parquet: {error}") from None

        self._rows = rows()

    def _open_text(self, source: str, file: io.BufferedReader, head: bytes, stack: ExitStack) -> None:
        found = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)
        self.has_mark = found is not None
        encoding = self._form.encoding or found or "utf-8"
        if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
            encoding = "utf-8-sig"
        try:
            text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
        except LookupError:
            raise TableError(f"{encoding!r} is not an encoding; such are utf-8, cp1252, latin-1, utf-16") from None
        stack.callback(text.detach)  # what it reads from is closed by others
        if found == "utf-16" and self._form.encoding is None:
            self._form.on_note(f"{self.name} is read as UTF-16")
        self._encoding = encoding
        lines = _Lines(text, self.name)
        first = lines.peek()
        ending = Path(source.lower().removesuffix(".gz").removesuffix(".zip")).suffix
        self.is_json = _is_json_lines(ending, first)
        if self.is_json:
            self._rows = self._json_rows(lines)
            first_row = next(self._rows, None)
            if first_row is not None:
                self.columns = list(first_row.values)
                self._rows = chain([first_row], self._rows)
        else:
            self._open_csv(lines, ending)

    # --- JSON lines ---

    def _json_rows(self, lines: "_Lines") -> Iterator[Row]:
        number = 0
        for line in lines:
            lines.begin_row()
            if not line.strip():
                continue
            number += 1
            if UNDECODED.search(line):
                self._refuse(lines.read, self._not_decoded(line))
                continue
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except _Twice as twice:
                self._refuse(lines.read, f"has the name {quoted(str(twice))} twice")
            except (ValueError, RecursionError):
                self._refuse(lines.read, "is not JSON, or not all of it")
            else:
                if isinstance(value, str):
                    value = {"text": value}
                if isinstance(value, dict):
                    yield Row(number, lines.read, value)
                else:
                    kind = {list: "an array", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
                    self._refuse(lines.read, f'is {kind}; each line must be an object such as {{"text": "…"}}')

    # --- CSV ---

    def _open_csv(self, lines: "_Lines", ending: str) -> None:
        csv.field_size_limit(2 * MAX_ROW_CHARS)  # a process's own; _Lines holds what is read to less
        named = SEP_LINE.fullmatch(lines.peek())
        if named:
            next(lines)
        while lines.peek() and not lines.peek().strip():
            next(lines)
        header = lines.peek()
        if "\0" in header:
            raise TableError(
                f"{self.name}, line {lines.read + 1}: holds NUL characters; if it is UTF-16, name it with "
                "--encoding utf-16-le or utf-16-be"
            )
        separator = _checked_separator(self._form.separator)
        if separator is None:
            separator = named[1] if named else "\t" if ending in TAB_ENDINGS else _find_separator(header)
            if separator != "," and not named and ending not in TAB_ENDINGS:
                self._form.on_note(f"{self.name} is read with {_shown(separator)} between its fields")
        self.separator = separator
        lines.begin_row()
        line = lines.read + 1
        reader = csv.reader(lines, delimiter=separator, strict=True)
        try:
            names = next(reader, None)
        except csv.Error as error:
            raise TableError(self._misquoted(line, lines, error)) from None
        if names is None:
            raise TableError(f"{self.name} is empty: a CSV begins with the names of its columns")
        if UNDECODED.search(header := "".join(names)):
            raise TableError(f"{self._where(line)}: {self._not_decoded(header)}")
        self.columns = _checked_names(self.name, [name.strip() for name in names])
        self._rows = self._csv_rows(reader, lines)

    def _csv_rows(self, reader: "Iterator[list[str]]", lines: "_Lines") -> Iterator[Row]:
        number, width = 0, len(self.columns)
        while True:
            lines.begin_row()
            line = lines.read + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                message = self._misquoted(line, lines, error)
                if lines.ended:
                    # What stands behind an open quote cannot be told into rows: to leave it out would lose them all.
                    raise TableError(message) from None
                number += 1
                self._form.refuse(message)
                continue
            if not fields or (width > 1 and len(fields) == 1 and not fields[0].strip()):
                continue  # a blank line
            number += 1
            if len(fields) != width:
                self._refuse(
                    line,
                    f"has {len(fields)} field{'' if len(fields) == 1 else 's'} where the header has {width}; a text "
                    f"that holds {_shown(self.separator or ',')} must stand in quotes",
                )
            elif UNDECODED.search(joined := "".join(fields)):
                self._refuse(line, self._not_decoded(joined))
            else:
                yield Row(number, line, dict(zip(self.columns, fields, strict=True)))

    def _misquoted(self, line: int, lines: "_Lines", error: csv.Error) -> str:
        if lines.ended:
            return f"{self._where(line)}: a quote that is opened in this row is never closed"
        until = "" if lines.read <= line else f" to line {lines.read}"
        return f"{self._where(line)}{until}: is not quoted as CSV is: {error}"

    def _not_decoded(self, text: str) -> str:
        found = UNDECODED.search(text)
        assert found is not None
        byte = ord(found.group()) - 0xDC00
        encoding = "UTF-8" if self._encoding == "utf-8-sig" else self._encoding
        advice = "If it is in another encoding, as cp1252 of Windows, name that with --encoding; or save it in UTF-8"
        return f"is not {encoding}, by its byte 0x{byte:02x}. {advice}"


class _Lines(Iterator[str]):
    """Lines of a text, counted. The lines of one row are bounded in their length.

    Attributes:
        read: how many were read.
        ended: somebody asked for a line after the last.
    """

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self.read = 0
        self.ended = False
        self._text = text
        self._name = name
        self._peeked: str | None = None
        self._row_line = 1
        self._row_chars = 0

    def begin_row(self) -> None:
        self._row_line, self._row_chars = self.read + 1, 0

    def peek(self) -> str:
        """The next line; empty at the end."""
        if self._peeked is None:
            self._peeked = self._readline()
        return self._peeked

    def __next__(self) -> str:
        line, self._peeked = self._readline() if self._peeked is None else self._peeked, None
        if not line:
            self.ended = True
            raise StopIteration
        self.read += 1
        self._row_chars += len(line)
        if self._row_chars >= MAX_ROW_CHARS:
            raise TableError(
                f"{self._name}, line {self._row_line}: the row that begins here has more than {MAX_ROW_CHARS:,} "
                "characters; is a quote left open?"
            )
        return line

    def _readline(self) -> str:
        return self._text.readline(MAX_ROW_CHARS)


@contextmanager
def open_table(source: str | Path, form: Form = AS_FOUND) -> Iterator[Table]:
    """The rows of a file, or of standard input where it is "-".

    What it is, and how it is packed, is told by its first bytes; between CSV and JSON lines its name's ending decides,
    or its first line. Text is UTF-8, or what its byte-order mark says, or what the form says: nothing is guessed.

    Raises:
        TableError: it cannot be read; also in the course of iterating.
        BadRow: of a row, in the course of iterating, where the form takes no bad rows.
    """
    name = "standard input" if str(source) == STDIN else str(source)
    table = Table(name, form)
    with ExitStack() as stack:
        with _damage_named(name):
            table._open(str(source), stack)
        yield table


def as_text(value: Any) -> str:
    """A value of any kind of table as a CSV would hold it; what is absent is empty."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, date):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False, default=str)


def quoted(name: str) -> str:
    """A column's name or a row's id, as a message may show it."""
    return repr(name) if TELLING_NAME.fullmatch(name) else f"one of {len(name)} characters"


def listed(names: Sequence[str]) -> str:
    """Names of columns, as a message may show them."""
    return ", ".join(map(quoted, names)) or "none"


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise TableError(f"{name} cannot be read: {why}") from None


@contextmanager
def _stored(source: str) -> Iterator[Any]:
    if source != STDIN:
        with Path(source).open("rb") as file:
            yield file
        return
    reader: Any = io.BufferedReader(sys.stdin.buffer)
    try:
        yield reader
    finally:
        reader.detach()


def _only_member(name: str, file: io.BufferedReader, stack: ExitStack) -> Any:
    if not file.seekable():
        raise TableError(f"{name} is a zip archive, which cannot be read from a pipe: name the file itself")
    archive = stack.enter_context(zipfile.ZipFile(file))
    members = [member for member in archive.infolist() if not member.is_dir()]
    if "[Content_Types].xml" in [member.filename for member in members]:
        raise TableError(f"{name} is a spreadsheet: save it as CSV")
    if len(members) != 1:
        raise TableError(f"{name} is an archive of {len(members)} files: take out the one to be read")
    return archive.open(members[0])


def _is_json_lines(ending: str, first: str) -> bool:
    if ending in (*CSV_ENDINGS, *TAB_ENDINGS):
        return False
    if ending in JSON_ENDINGS or not first or first.lstrip().startswith(("{", "[")):
        return True
    try:
        return isinstance(json.loads(first), str)
    except (ValueError, RecursionError):
        return False


def _find_separator(header: str) -> str:
    """The one that splits a header into the most names."""

    def names(separator: str) -> int:
        return len(next(csv.reader([header], delimiter=separator), []))

    return max(SEPARATORS, key=names)


def _checked_separator(given: str | None) -> str | None:
    separator = "\t" if given in ("tab", r"\t") else given
    if separator is not None and (len(separator) != 1 or separator in '"\r\n\0'):
        raise TableError(f"--separator {given!r} must be one character, or tab")
    return separator


def _shown(separator: str) -> str:
    return "tabs" if separator == "\t" else repr(separator)


def _checked_names(table: str, names: Sequence[str]) -> list[str]:
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise TableError(f"{table} has the column {quoted(twice)} twice; rename one")
    if names.count("") > 1:
        raise TableError(f"{table} has {names.count('')} columns without a name: name them in the header")
    return list(names)


def _decoded(value: Any) -> Any:
    """Some writers of Parquet store texts as plain bytes."""
    return value.decode() if isinstance(value, bytes) else value


class _Twice(Exception):
    """A name that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for place, name in enumerate(names) if name in names[:place]))
    return values
