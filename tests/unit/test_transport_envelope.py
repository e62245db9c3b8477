"""What may reach a consumer, and what is said of the rest."""

import base64
import bz2
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.envelope import (
    MALFORMED_BODY_BYTES,
    MALFORMED_BYTES_HEADER,
    MALFORMED_HEADER,
    MAX_MESSAGE_BYTES,
    MAX_SEARCHED_BYTES,
    MalformedMessage,
    malformed_envelope,
    may_forbid_storing,
    read_envelope,
)

BODY = b'[[[{"text": "hello"}]], {}, {}]'


def changed(**changes: Any) -> bytes:
    """A good envelope but for these entries."""
    whole: dict[str, Any] = {
        "body": base64.b64encode(BODY).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "worker.moderate", "id": "1"},
        "properties": {"body_encoding": "base64", "delivery_tag": "a", "delivery_info": {}},
    }
    return json.dumps(whole | changes).encode()


def compressed(body: bytes) -> bytes:
    return changed(body=base64.b64encode(body).decode(), headers={"compression": "application/x-gzip"})


def test_body_and_headers_of_a_kombu_envelope_are_read() -> None:
    read = read_envelope(changed())
    assert read["body"] == BODY
    assert read["headers"] == {"task": "worker.moderate", "id": "1"}


def test_body_that_is_not_base64_is_read_as_text() -> None:
    text = BODY.decode()
    assert read_envelope(changed(body=text, properties={"body_encoding": "utf-8"}))["body"] == BODY


def test_zlib_body_is_decompressed_once() -> None:
    read = read_envelope(compressed(zlib.compress(BODY)))
    assert read["body"] == BODY
    assert "compression" not in read["headers"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"hello", "not JSON", id="not-json"),
        pytest.param(b"\xff\xfe{}", "not UTF-8", id="not-utf8"),
        pytest.param(b"[1,2]", "not a list", id="list"),
        pytest.param(b"[" * 200_000 + b"]" * 200_000, "nested too deeply", id="deep"),
        pytest.param(b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply", id="deep-objects"),
        pytest.param(b"1" * 5_000, "not JSON", id="endless-number"),
        pytest.param(b" " * (MAX_MESSAGE_BYTES + 1), "bytes long", id="too-long"),
        pytest.param(b"{}", "headers and properties", id="no-properties"),
        pytest.param(changed(properties=None), "headers and properties", id="null-properties"),
        pytest.param(changed(headers=[1]), "headers and properties", id="list-headers"),
        pytest.param(changed(headers={"task": ["unhashable"]}), "task must be a string", id="task-list"),
        pytest.param(changed(**{"content-type": "application/x-python-serialize"}), "python-serialize", id="pickle"),
        pytest.param(changed(**{"content-type": None}), "content type None", id="no-content-type"),
        pytest.param(changed(body=5), "body must be a string", id="body-number"),
        pytest.param(changed(body="not base64!"), "not base64", id="not-base64"),
        pytest.param(changed(properties={"body_encoding": "rot13"}), "'rot13'", id="unknown-body-encoding"),
        pytest.param(changed(properties={"body_encoding": [1]}), "[1]", id="list-body-encoding"),
        pytest.param(changed(headers={"compression": "application/x-bz2"}), "only zlib", id="unknown-compression"),
        pytest.param(compressed(BODY), "not zlib", id="not-compressed"),
        pytest.param(
            compressed(zlib.compress(bytes(MAX_MESSAGE_BYTES + 1))),
            "cut short, or holds more",
            id="decompression-bomb",
        ),
    ],
)
def test_what_no_consumer_could_read_is_refused_with_the_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage) as refusal:
        read_envelope(raw)
    assert reason in str(refusal.value)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read_envelope(raw)


@given(
    st.dictionaries(
        st.sampled_from(["body", "content-type", "content-encoding", "headers", "properties"]),
        st.sampled_from(["application/json", "", {}, [], None, 3, {"body_encoding": "base64"}, {"compression": []}]),
    )
)
def test_changed_envelope_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        assert isinstance(read_envelope(changed(**changes))["body"], bytes)
    except MalformedMessage as refusal:
        assert str(refusal)


def test_wrapped_message_says_why_and_keeps_the_beginning() -> None:
    # Given raw bytes longer than what is kept
    raw = b"\xff" * (MALFORMED_BODY_BYTES + 10)
    # When they are wrapped
    wrapped = malformed_envelope(raw, "the message is not UTF-8")
    # Then the headers say why, how long it was, and give it the same id at every delivery
    assert wrapped["headers"][MALFORMED_HEADER] == "the message is not UTF-8"
    assert wrapped["headers"][MALFORMED_BYTES_HEADER] == len(raw)
    assert wrapped["headers"]["id"] == malformed_envelope(raw, "")["headers"]["id"]
    assert wrapped["body"] == raw[:MALFORMED_BODY_BYTES]


SECRET_BODY = b'[[[{"text": "hello, hello, hello", "store_text": false}]], {}, {}]'


def enveloped(body: bytes, **changes: Any) -> bytes:
    return changed(body=base64.b64encode(body).decode(), **changes)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(SECRET_BODY, id="a body"),
        pytest.param(json.dumps(SECRET_BODY.decode()).encode(), id="a body in a string"),
        pytest.param(SECRET_BODY.replace(b"store_text", rb"st\u006fre_text"), id="in disguise"),
        pytest.param(SECRET_BODY.replace(b"false", b"0"), id="0"),
        pytest.param(SECRET_BODY[:-16], id="the value cut off"),
        pytest.param(enveloped(SECRET_BODY), id="base64"),
        pytest.param(enveloped(SECRET_BODY).replace(b"/", rb"\/"), id="base64 with escaped slashes"),
        *(pytest.param(enveloped(SECRET_BODY)[start:-150], id=f"base64 from {start}") for start in range(10, 18)),
        pytest.param(enveloped(zlib.compress(SECRET_BODY)), id="zlib"),
        pytest.param(enveloped(zlib.compress(SECRET_BODY)[:-9]), id="zlib cut off"),
        pytest.param(enveloped(zlib.compress(bytes(MAX_MESSAGE_BYTES + 1))), id="a decompression bomb"),
        pytest.param(enveloped(bz2.compress(BODY), headers={"compression": "application/x-bz2"}), id="bz2"),
        pytest.param(b"x" * (MAX_SEARCHED_BYTES + 1), id="too long to search"),
    ],
)
def test_what_may_not_be_stored_leaves_no_bytes(raw: bytes) -> None:
    assert may_forbid_storing(raw)
    wrapped = malformed_envelope(raw, "")
    assert (wrapped["body"], wrapped["headers"][MALFORMED_BYTES_HEADER]) == (b"", len(raw))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(changed(), id="says nothing of it"),
        pytest.param(enveloped(SECRET_BODY.replace(b"false", b"true")), id="true"),
        pytest.param(json.dumps(SECRET_BODY.replace(b"false", b"true").decode()).encode(), id="true in a string"),
        pytest.param(compressed(zlib.compress(BODY)), id="zlib"),
        pytest.param(bytes(range(256)) * 4_096, id="binary"),
    ],
)
def test_what_may_be_stored_is_kept(raw: bytes) -> None:
    assert not may_forbid_storing(raw)


@given(st.binary(max_size=60), st.integers(0, 20), st.sampled_from(["", "=", "==", "=" * 9]))
def test_any_bytes_are_looked_through(raw: bytes, start: int, end: str) -> None:
    may_forbid_storing((base64.b64encode(raw).decode()[start:] + end).encode())
