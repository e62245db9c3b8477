"""Files of comments: every field is read, nothing is passed over in silence, and a row has one name."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.comment_files import find_fields, read_comments
from config.table_files import AS_FOUND, BadRow, Form, TableError, open_table

Comments = list[dict[str, Any]]


def comments(
    path: Path, content: str, form: Form = AS_FOUND, again: bool = False, key_column: str | None = None
) -> Comments:
    path.write_text(content, encoding="utf-8")
    with open_table(path, form) as table:
        fields = find_fields(table, key_column=key_column)
        return list(read_comments(table, fields, community="news", durable=False, again=again))


def keys(path: Path, content: str, key_column: str | None = None) -> list[str]:
    return [comment["idempotency_key"] for comment in comments(path, content, key_column=key_column)]


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl"])
def test_every_field_of_a_comment_is_read(tmp_path: Path, name: str) -> None:
    full = {
        "text": "hello",
        "id": "7",
        "community": "kids",
        "author": "zoe",
        "language": "de",
        "created_at": "2026-11-01T12:00:00Z",
        "expires_at": "2026-12-01T12:00:00Z",
        "context": {"post": 1},
        "idempotency_key": "k",
        "store_text": False,
    }
    if name == "c.csv":
        cells = [json.dumps(each).replace('"', '""') if isinstance(each, dict) else str(each) for each in full.values()]
        content = ",".join(full) + "\n" + ",".join(f'"{cell}"' for cell in cells) + "\nthanks,,,,,,,,,\n"
    else:
        content = json.dumps(full) + '\n{"text": "thanks"}\n'
    first, second = comments(tmp_path / name, content)
    assert first == full
    assert {field: value for field, value in second.items() if field != "idempotency_key"} == {
        "text": "thanks",
        "community": "news",
    }


def test_options_name_columns_and_what_is_no_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("body,text,nr,key,toxic\nhello,x,7,k,1\n")
    with open_table(tmp_path / "c.csv") as table:
        fields = find_fields(table, text_column="body", id_column="nr", key_column="key")
        assert fields.unread == ["text", "toxic"]
        [comment] = read_comments(table, fields, community=None, durable=False, again=False)
    assert comment == {"text": "hello", "id": "7", "idempotency_key": "k"}
    for field in ("text", "id", "key"):
        with open_table(tmp_path / "c.csv") as table, pytest.raises(TableError, match=f"'nope'.*--{field}-column"):
            find_fields(table, **{f"{field}_column": "nope"})


def test_a_row_has_one_name(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    first = keys(path, "id,text\n1,hello\n1,hello\n,\u00e4\n")
    # Each row has its own, and the next time the same one
    assert len(set(first)) == 3
    assert keys(path, "text,id\nhello,1\nhello,1\n\u00e4,\n") == first
    # Another id, text or place is another comment, and a longer text before it no other place
    assert not set(keys(path, "id,text\n2,hello\n1,hallo\n3,\u00e4\n")) & set(first)
    assert keys(path, 'id,text\n1,"long\ner"\n1,hello\n')[1] == first[1]
    # A key of one's own counts, and who wants new submissions has no other
    assert keys(path, "id,text\n1,hello\n", key_column="id") == ["1"]
    assert "idempotency_key" not in comments(path, "id,text\n1,hello\n", again=True)[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("c.csv", "text,id\na,1\n,2\nb,3\n", id="no text"),
        pytest.param("c.csv", f"text,id\na,1\nx,{'9' * 201}\nb,3\n", id="id too long"),
        pytest.param("c.csv", "text,created_at\na,\nx,yesterday\nb,\n", id="no time"),
        pytest.param("c.csv", "text,store_text\na,\nx,perhaps\nb,True\n", id="no boolean"),
        pytest.param("c.csv", "text,context\na,{}\nx,{\nb,\n", id="no JSON"),
        pytest.param("c.jsonl", '"a"\n{"text": "x", "autor": "y"}\n"b"\n', id="no field"),
        pytest.param("c.jsonl", '"a"\n{"id": 1}\n"b"\n', id="nothing"),
        pytest.param("c.jsonl", '"a"\n{"text": "\\ud800"}\n"b"\n', id="surrogate"),
    ],
)
def test_what_no_worker_would_take_is_refused_by_its_line_or_left_out(tmp_path: Path, name: str, content: str) -> None:
    line = 2 if name == "c.jsonl" else 3
    with pytest.raises(BadRow, match=f"{name}, line {line}: "):
        comments(tmp_path / name, content)
    bad: list[BadRow] = []
    left = comments(tmp_path / name, content, Form(on_bad_row=bad.append))
    assert [comment["text"] for comment in left] == ["a", "b"]
    assert len(bad) == 1
