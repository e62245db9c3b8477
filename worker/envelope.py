"""The envelope that kombu writes around a message's body: read with every bound, or replaced where it is broken.

Owns what may reach a consumer. Pure: bytes in, an envelope out.
"""

import binascii
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from pydantic_core import from_json

from config.comment import shown
from config.names import MODERATE_TASK

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Above what 256 of the longest comments take when JSON escapes every character."""

MALFORMED_HEADER = "moderato_malformed"
"""Why the message could not be read, in words. Its body is then the beginning of the raw message."""
MALFORMED_BYTES_HEADER = "moderato_malformed_bytes"
"""The raw message's whole length."""
MALFORMED_BODY_BYTES = 64 * 1024

MAX_VALUES = 1_000_000
"""In the JSON of an envelope or a body; 256 comments hold fewer. Reading one takes a second, and no other byte of a
message is so expensive."""

MAX_SEARCHED_BYTES = 8 * 1024 * 1024
"""Of what cannot be read: where more is left, what it may forbid is not looked for but taken for granted."""
MAX_SEARCH_BYTES = 64 * 1024 * 1024
"""The same for one message in sum: what is left of it, what stands in it in base64, and what that decompresses to."""
LEAST_SEARCH_BYTES = 1_024
"""The least that one part counts for, however short it is: thousands of short ones take time too."""
FORBIDS_STORING = re.compile(rb'store_text(?!\\*"\s*:\s*true\b)')
"""Anything but a plain true, in JSON or in JSON within a string: what is this wrong may have meant to forbid it."""
DISGUISED = re.compile(rb"\\u00(?:3[0-9]|[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")
"""A letter, digit or underscore that is written as an escape, as no producer does: it may spell `store_text`."""
BASE64_ESCAPES = {rb"\/": b"/", rb"\u002b": b"+", rb"\u002B": b"+", rb"\u002f": b"/", rb"\u002F": b"/"}
"""As some producers write what stands in base64 in JSON."""
BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")
ZLIB = "application/x-gzip"
CONTENT_TYPES = ("application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack")
ENCODINGS = ("base64", "utf-8", "binary", "ascii")
COMPRESSIONS = (ZLIB, "application/x-bz2", "application/x-lzma", "application/x-brotli", "application/zstd")
"""What kombu's producers may write, and so what may be quoted of it."""
ZLIB_BEGINNINGS = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
COMPRESSED = re.compile(rb'"compression"\s*:\s*"')


class MalformedMessage(ValueError):
    """A message that no consumer could read; says why in words, without any of its text."""


def read_envelope(raw: bytes) -> dict[str, Any]:
    """The envelope that kombu's producers write, checked, with its body as decoded bytes.

    Raises:
        MalformedMessage: it is not such an envelope, or its body is not JSON by its own account.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"the message is {len(raw)} bytes long; at most {MAX_MESSAGE_BYTES} are read")
    if holds_more_values(raw, MAX_VALUES):
        raise MalformedMessage(f"the envelope holds more than {MAX_VALUES:,} values")
    try:
        envelope = from_json(raw)
    except ValueError:
        envelope = _loads(raw)
    if not isinstance(envelope, dict):
        raise MalformedMessage(f"the envelope must be a JSON object, not a {type(envelope).__name__}")
    # null and [], as older clients for Go and PHP send them, say what an empty object says.
    headers, properties = envelope.get("headers"), envelope.get("properties")
    if headers is None or headers == []:
        headers = envelope["headers"] = {}
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise MalformedMessage("the envelope's headers and properties must be JSON objects")
    if not isinstance(headers.get("task", ""), str):
        raise MalformedMessage("the header task must be a string")
    for ours in (MALFORMED_HEADER, MALFORMED_BYTES_HEADER):
        headers.pop(ours, None)  # a producer's would be taken for our own word
    if envelope.get("content-type") != "application/json":
        said = shown(envelope.get("content-type"), CONTENT_TYPES)
        raise MalformedMessage(f"the content type must be application/json, not {said}")
    body = _decode(envelope.get("body"), properties.get("body_encoding"))
    # Both are undone here: kombu would do it again, without a bound on what comes out.
    envelope["body"] = _decompress(body, headers.pop("compression", None))
    properties["body_encoding"] = None
    return envelope


def _loads(raw: bytes) -> object:
    """What the fast reader refuses: this one reads lone surrogates and deeper nesting, or says what is wrong."""
    try:
        return json.loads(str(raw, "utf-8"))
    except UnicodeDecodeError:
        raise MalformedMessage("the message is not UTF-8") from None
    except RecursionError:
        raise MalformedMessage("the message is nested too deeply") from None
    except ValueError:
        raise MalformedMessage("the message is not JSON") from None


def _decode(body: object, encoding: object) -> bytes:
    if not isinstance(body, str):
        raise MalformedMessage("the body must be a string")
    try:
        if encoding == "base64":
            return binascii.a2b_base64(body, strict_mode=True)
        if encoding in (None, "utf-8"):
            return body.encode()
    except ValueError:
        raise MalformedMessage(f"the body is not {encoding or 'utf-8'}, as its body_encoding says") from None
    raise MalformedMessage(f"body_encoding must be base64 or utf-8, not {shown(encoding, ENCODINGS)}")


def _decompress(body: bytes, compression: object) -> bytes:
    if compression is None:
        return body
    if compression != ZLIB:
        said = shown(compression, COMPRESSIONS)
        raise MalformedMessage(f"compression must be {ZLIB} (zlib), not {said}")
    return _unzipped(body, MAX_MESSAGE_BYTES)


def _unzipped(body: bytes, most: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        plain = decompressor.decompress(body, most)
    except zlib.error:
        raise MalformedMessage("the body is not zlib, as its compression header says") from None
    if not decompressor.eof:
        raise MalformedMessage(f"the compressed body is cut short, or holds more than {most} bytes")
    return plain


def holds_more_values(json_text: bytes, most: int) -> bool:
    """Whether a JSON text holds more values than this: known before anything is made of them, in linear time."""
    if len(json_text) <= most or _values(json_text) <= most:
        return False
    # Most of it may stand within strings, which the quotes part from the rest.
    unescaped = json_text.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 4 * most:  # each string has two, and is a value or the name of one
        return True
    return _values(b"".join(unescaped.split(b'"')[::2])) > most


def _values(json_text: bytes) -> int:
    return 1 + sum(map(json_text.count, (b",", b"[", b"{")))


def malformed_envelope(raw: bytes, reason: str, *, searched: bool = True) -> dict[str, Any]:
    """A well-formed envelope around one that is not, so that it travels to the consumer like any other message.

    Named as our task, because Celery logs the body of a message without a task and drops it.

    Args:
        searched: false where looking into it may be what ends its workers; nothing of it is kept then.
    """
    headers = {
        "task": MODERATE_TASK,
        "id": hashlib.sha256(raw).hexdigest(),
        MALFORMED_HEADER: reason,
        MALFORMED_BYTES_HEADER: len(raw),
    }
    return {
        "body": raw[:MALFORMED_BODY_BYTES] if searched and not StoringSearch().may_forbid(raw) else b"",
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "headers": headers,
        "properties": {"body_encoding": None},
    }


class StoringSearch:
    """Looks for comments that forbid storing in what cannot be read of one message. One bound holds for all parts."""

    def __init__(self) -> None:
        self._left = MAX_SEARCH_BYTES

    def may_forbid(self, raw: bytes) -> bool:
        """Whether a message, body or comment that cannot be read may hold a comment with `store_text: false`.

        What looks like a body in base64 is looked into, also where it begins or ends too soon. Where it cannot be
        told, as in what is compressed and damaged, or past the bound, it may.
        """
        if len(raw) > MAX_SEARCHED_BYTES or not self._may_look_at(raw) or _forbids(raw):
            return True
        for escape, plain in BASE64_ESCAPES.items():
            raw = raw.replace(escape, plain)
        decompressed_some = False
        for body in _bodies(raw):
            if not self._may_look_at(body):
                return True
            if body[:2] in ZLIB_BEGINNINGS:
                try:
                    body = _unzipped(body, self._left)
                except MalformedMessage:
                    self._left = 0  # of damaged ones nobody says how much came out before
                    return True
                decompressed_some = True
                if not self._may_look_at(body):
                    return True
            if _forbids(body):
                return True
        return bool(COMPRESSED.search(raw)) and not decompressed_some

    def _may_look_at(self, part: bytes) -> bool:
        self._left -= max(len(part), LEAST_SEARCH_BYTES)
        return self._left > 0


def _forbids(json_text: bytes) -> bool:
    return bool(FORBIDS_STORING.search(json_text) or DISGUISED.search(json_text))


def _bodies(raw: bytes) -> Iterator[bytes]:
    """What stands in base64 in it; a part whose beginning is lost may begin anywhere."""
    for part in BASE64.finditer(raw):
        for start in range(4):
            whole = (len(part[0]) - start) // 4 * 4
            yield binascii.a2b_base64(part[0][start : start + whole])


def write_envelope(headers: Mapping[str, Any], body: bytes, queue: str) -> bytes:
    """A message as kombu's producers write it."""
    envelope = {
        "body": binascii.b2a_base64(body, newline=False).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_mode": 2,
            "delivery_tag": str(uuid4()),
        },
    }
    return json.dumps(envelope).encode()
