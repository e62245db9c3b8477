"""What may reach a consumer, and what is said of the rest."""

import base64
import binascii
import bz2
import json
import zlib
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import MODERATE_TASK
from worker import envelope
from worker.envelope import (
    LEAST_SEARCH_BYTES,
    MALFORMED_BODY_BYTES,
    MALFORMED_BYTES_HEADER,
    MALFORMED_HEADER,
    MAX_MESSAGE_BYTES,
    MAX_SEARCH_BYTES,
    MAX_SEARCHED_BYTES,
    MalformedMessage,
    StoringSearch,
    holds_more_values,
    malformed_envelope,
    read_envelope,
)
from worker.message import parse_message
from worker.transport import UNREAD_RETURNS, Delivery, Message

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


@pytest.mark.parametrize("headers", [None, []])
def test_headers_that_are_empty_in_another_way_are_none(headers: object) -> None:
    # As gocelery and celery-php sent them, with all of Celery's protocol 1 in the body
    assert read_envelope(changed(headers=headers))["headers"] == {}


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
        pytest.param(changed(**{"content-type": None}), "application/json, not null", id="no-content-type"),
        pytest.param(changed(body=5), "body must be a string", id="body-number"),
        pytest.param(changed(body="not base64!"), "not base64", id="not-base64"),
        pytest.param(
            changed(properties={"body_encoding": "rot13"}),
            "base64 or utf-8, not a name of 5",
            id="unknown-body-encoding",
        ),
        pytest.param(changed(properties={"body_encoding": [1]}), "a list", id="list-body-encoding"),
        pytest.param(changed(headers={"compression": "application/x-bz2"}), "x-bz2", id="unknown-compression"),
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
    assert StoringSearch().may_forbid(raw)
    wrapped = malformed_envelope(raw, "")
    assert (wrapped["body"], wrapped["headers"][MALFORMED_BYTES_HEADER]) == (b"", len(raw))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(changed(), id="says nothing of it"),
        pytest.param(changed(body=r"<p>\u003c \u002b \u0026 \/ \u00e9 \n"), id="escapes that producers write"),
        pytest.param(enveloped(SECRET_BODY.replace(b"false", b"true")), id="true"),
        pytest.param(json.dumps(SECRET_BODY.replace(b"false", b"true").decode()).encode(), id="true in a string"),
        pytest.param(compressed(zlib.compress(BODY)), id="zlib"),
        pytest.param(bytes(range(256)) * 4_096, id="binary"),
    ],
)
def test_what_may_be_stored_is_kept(raw: bytes) -> None:
    assert not StoringSearch().may_forbid(raw)


@given(st.binary(max_size=60), st.integers(0, 20), st.sampled_from(["", "=", "==", "=" * 9]))
def test_any_bytes_are_looked_through(raw: bytes, start: int, end: str) -> None:
    StoringSearch().may_forbid((base64.b64encode(raw).decode()[start:] + end).encode())


class CountedZlib:
    """zlib that counts what comes out of it."""

    error = zlib.error

    def __init__(self) -> None:
        self.decompressed_bytes = 0

    def decompressobj(self) -> Any:
        inner, outer = zlib.decompressobj(), self

        class Decompressor:
            eof = property(lambda _: inner.eof)

            def decompress(self, data: bytes, most: int) -> bytes:
                plain = inner.decompress(data, most)
                outer.decompressed_bytes += len(plain)
                return plain

        return Decompressor()


BOMBS = b" ".join([base64.b64encode(zlib.compress(bytes(1 << 20)))] * 100)


@pytest.mark.parametrize(
    ("returns", "most"), [pytest.param(0, MAX_SEARCH_BYTES, id="first"), pytest.param(UNREAD_RETURNS, 0, id="unread")]
)
def test_one_bound_holds_for_all_that_a_message_decompresses_to(
    monkeypatch: pytest.MonkeyPatch, returns: int, most: int
) -> None:
    # Given a message of 100 compressed parts of 1 MiB each, none of which forbids anything
    counted = CountedZlib()
    monkeypatch.setattr(envelope, "zlib", counted)
    message = Message(Delivery("tag", "toxicity", BOMBS, returns))
    # Then no more of them is decompressed than one message may, and nothing of what is left out is kept
    assert counted.decompressed_bytes <= most
    assert (message.body, message.headers[MALFORMED_BYTES_HEADER]) == (b"", len(BOMBS))
    # And so for as many bad comments in one list
    counted.decompressed_bytes = 0
    body = json.dumps([[[{"text": 1, "x": part.decode()} for part in BOMBS.split()]], {}, {}]).encode()
    refused = parse_message({"task": MODERATE_TASK}, body, now=datetime.now(UTC)).refused
    assert counted.decompressed_bytes <= MAX_SEARCH_BYTES
    assert {bool(one.payload) for one in refused[:40]} == {True}
    assert refused[-1].payload == b""


@pytest.mark.parametrize("part", [b"A" * 16, base64.b64encode(zlib.compress(b"abcdef"))], ids=["plain", "zlib"])
def test_short_parts_have_a_bound_too(monkeypatch: pytest.MonkeyPatch, part: bytes) -> None:
    looks = 0

    def counted(text: bytes) -> bytes:
        nonlocal looks
        looks += 1
        return binascii.a2b_base64(text)

    monkeypatch.setattr(envelope, "binascii", SimpleNamespace(a2b_base64=counted))
    assert StoringSearch().may_forbid(b" ".join([part] * 100_000))
    assert looks <= MAX_SEARCH_BYTES // LEAST_SEARCH_BYTES


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (b"[" + b"0," * 50 + b"0]", False),
        (b"[" + b"0," * 200 + b"0]", True),
        (b"[" + b"{}," * 200 + b"0]", True),
        (b"[" + b'"",' * 200 + b"0]", True),
        (rb'["' + rb",[{\",\\" * 200 + rb'"]', False),
    ],
)
def test_values_are_counted_outside_of_strings(body: bytes, more: bool) -> None:
    assert holds_more_values(body, 100) == more
