"""Files that people bring: read as they are meant, or refused with their line; never shifted, cut or garbled."""

import gzip
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from config import table_files
from config.table_files import AS_FOUND, BadRow, Form, TableError, open_table

Values = list[dict[str, Any]]
ROWS = [{"id": "1", "text": "grün, gelb"}, {"id": "2", "text": "a\nb"}]
CSV = 'id,text\n1,"grün, gelb"\n2,"a\nb"\n'


def separated_by(separator: str) -> str:
    return CSV.replace(",", separator).replace(f"n{separator}", "n,")


def packed(name: str, content: str) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, content)
    return archive.getvalue()


def parquet(rows: Values) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def read(path: Path, content: bytes, form: Form = AS_FOUND) -> Values:
    path.write_bytes(content)
    with open_table(path, form) as table:
        return [row.values for row in table]


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        pytest.param("a.csv", CSV.encode(), Form(), id="csv"),
        pytest.param(
            "a.CSV", CSV.replace("\n", "\r\n").replace("a\r\nb", "a\nb").encode("utf-8-sig"), Form(), id="BOM"
        ),
        pytest.param("a.csv", separated_by(";").encode(), Form(), id="semicolons"),
        pytest.param("a.csv", b"sep=;\r\n" + separated_by(";").encode(), Form(), id="sep"),
        pytest.param("a.txt", separated_by("\t").encode("utf-16"), Form(), id="UTF-16 and tabs"),
        pytest.param("a.tsv", separated_by("\t").encode(), Form(), id="TSV"),
        pytest.param("a.csv", separated_by("!").encode(), Form(separator="!"), id="separator"),
        pytest.param("a.csv", CSV.encode("cp1252"), Form(encoding="cp1252"), id="cp1252"),
        pytest.param("a.csv.gz", gzip.compress(CSV.encode()), Form(), id="gzip"),
        pytest.param("a.zip", packed("a.csv", CSV), Form(), id="zip"),
        pytest.param("a.parquet", parquet(ROWS), Form(), id="Parquet"),
        pytest.param("a.pq", parquet([{**row, "text": row["text"].encode()} for row in ROWS]), Form(), id="bytes"),
        pytest.param(
            "a", b'{"id": "1", "text": "gr\\u00fcn, gelb"}\n\n{"id": "2", "text": "a\\nb"}', Form(), id="JSON"
        ),
    ],
)
def test_what_a_file_is_read_as(tmp_path: Path, name: str, content: bytes, form: Form) -> None:
    assert read(tmp_path / name, content, form) == ROWS


@pytest.mark.parametrize(
    ("content", "line", "left"),
    [
        pytest.param(b"a,b\n1,2,\n3,4\n", 2, ["3"], id="too many fields"),
        pytest.param(b"a,b\n1,2\n3\n5,6\n", 3, ["1", "5"], id="too few fields"),
        pytest.param(b'a,b\n1,"2\n2"\n3,"4"4\n5,6\n', 4, ["1", "5"], id="a quote within"),
        pytest.param(b"a,b\n1,2\n3,\xe4\n5,6\n", 3, ["1", "5"], id="not UTF-8"),
        pytest.param(b'{"a": "1"}\n[1]\n{"a": "2"}\n', 2, ["1", "2"], id="array"),
        pytest.param(b'{"a": "1"}\nnull\n{"a": "2"}\n', 2, ["1", "2"], id="null"),
        pytest.param(b'{"a": "1"}\n{"a": 1, "a": 2}\n{"a": "2"}\n', 2, ["1", "2"], id="a name twice"),
        pytest.param(b'{"a": "1"}\n' + b"[" * 100_000 + b'\n{"a": "2"}\n', 2, ["1", "2"], id="nested"),
        pytest.param(b'{"a": "1"}\n{"a": "2"\n', 2, ["1"], id="not JSON"),
        pytest.param(b'{"a": "1"}\n{"a": "\xe4"}\n', 2, ["1"], id="JSON, not UTF-8"),
    ],
)
def test_a_bad_row_is_refused_by_its_line_or_left_out(
    tmp_path: Path, content: bytes, line: int, left: list[str]
) -> None:
    path, bad = tmp_path / "rows", list[BadRow]()
    with pytest.raises(BadRow, match=rf"{path}, line {line}\b"):
        read(path, content)
    assert [row["a"] for row in read(path, content, Form(on_bad_row=bad.append))] == left
    assert [f"rows, line {line}:" in str(row) for row in bad] == [True]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.csv", b'a,b\n1,"open\n2,3\n4,5\n', id="a quote that is never closed"),
        pytest.param("a.csv", b"a,a\n1,2\n", id="a column twice"),
        pytest.param("a.csv", b"", id="empty"),
        pytest.param("a.csv", CSV.encode("utf-16-le"), id="UTF-16 without a mark"),
        pytest.param("a.csv.gz", gzip.compress(CSV.encode())[:-12], id="cut short"),
        pytest.param("a.csv.gz", gzip.compress(CSV.encode())[:12] + b"damage" * 5, id="damaged"),
        pytest.param("a.xlsx", packed("[Content_Types].xml", ""), id="spreadsheet"),
        pytest.param("a.parquet", parquet(ROWS)[:-30], id="Parquet, cut short"),
    ],
)
def test_what_is_no_table_is_refused_even_where_bad_rows_are_left_out(
    tmp_path: Path, name: str, content: bytes
) -> None:
    bad: list[BadRow] = []
    with pytest.raises(TableError) as refused:
        read(tmp_path / name, content, Form(on_bad_row=bad.append))
    assert str(tmp_path / name) in str(refused.value) and not isinstance(refused.value, BadRow) and not bad


def test_an_option_that_fits_nothing(tmp_path: Path) -> None:
    for form in (Form(encoding="klingon"), Form(separator=",,"), Form(separator='"')):
        with pytest.raises(TableError):
            read(tmp_path / "a.csv", CSV.encode(), form)


def test_parquet_without_its_library_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet(ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TableError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet", content)


def test_a_header_that_may_be_a_comment_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(TableError) as refused:
        read(tmp_path / "a.csv", b"you fool,you fool\n")
    assert "fool" not in str(refused.value)


def test_memory_is_bounded_by_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an open quote, or a line, of far more than a row may have
    monkeypatch.setattr(table_files, "MAX_ROW_CHARS", 1_000)
    for content in (b'a,b\n1,"' + b"x\n" * 50_000, b'a,b\n1,"' + b"x" * 100_000):
        (tmp_path / "a.csv").write_bytes(content)
        with open_table(tmp_path / "a.csv") as table:
            with pytest.raises(TableError, match="line 2"):
                list(table)
            # Then no more than that was read of it, but for buffers
            assert table.bytes_read() < 50_000
    # And a file is read as its rows are asked for
    (tmp_path / "a.csv").write_bytes(b"a,b\n" + b"1,2\n" * 100_000)
    with open_table(tmp_path / "a.csv") as table:
        next(iter(table))
        assert 0 < table.bytes_read() < 50_000
