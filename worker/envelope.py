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

MAX_SEARCHED_BYTES = 8 * 1024 * 1024
"""Of what cannot be read: where more is left, what it may forbid is not looked for but taken for granted."""
FORBIDS_STORING = re.compile(rb'store_text(?!\\*"\s*:\s*true\b)')
"""Anything but a plain true, in JSON or in JSON within a string: what is this wrong may have meant to forbid it."""
ESCAPED_ASCII = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")
ZLIB = "application/x-gzip"
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
    try:
        envelope = from_json(raw)
    except ValueError:
        envelope = _loads(raw)
    if not isinstance(envelope, dict):
        raise MalformedMessage(f"the envelope must be a JSON object, not a {type(envelope).__name__}")
    headers, properties = envelope.setdefault("headers", {}), envelope.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise MalformedMessage("the envelope's headers and properties must be JSON objects")
    if not isinstance(headers.get("task", ""), str):
        raise MalformedMessage("the header task must be a string")
    for ours in (MALFORMED_HEADER, MALFORMED_BYTES_HEADER):
        headers.pop(ours, None)  # a producer's would be taken for our own word
    if envelope.get("content-type") != "application/json":
        raise MalformedMessage(f"content type {shown(envelope.get('content-type'))}: only application/json is read")
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
    raise MalformedMessage(f"body_encoding {shown(encoding)}: only base64 and utf-8 are read")


def _decompress(body: bytes, compression: object) -> bytes:
    if compression is None:
        return body
    if compression != ZLIB:
        raise MalformedMessage(f"compression {shown(compression)}: only zlib is read")
    decompressor = zlib.decompressobj()
    try:
        plain = decompressor.decompress(body, MAX_MESSAGE_BYTES)
    except zlib.error:
        raise MalformedMessage("the body is not zlib, as its compression header says") from None
    if not decompressor.eof:
        raise MalformedMessage(f"the compressed body is cut short, or holds more than {MAX_MESSAGE_BYTES} bytes")
    return plain


def malformed_envelope(raw: bytes, reason: str) -> dict[str, Any]:
    """A well-formed envelope around one that is not, so that it travels to the consumer like any other message.

    Named as our task, because Celery logs the body of a message without a task and drops it.
    """
    headers = {
        "task": MODERATE_TASK,
        "id": hashlib.sha256(raw).hexdigest(),
        MALFORMED_HEADER: reason,
        MALFORMED_BYTES_HEADER: len(raw),
    }
    return {
        "body": b"" if may_forbid_storing(raw) else raw[:MALFORMED_BODY_BYTES],
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "headers": headers,
        "properties": {"body_encoding": None},
    }


def may_forbid_storing(raw: bytes) -> bool:
    """Whether a message or body that cannot be read may hold a comment with `store_text: false`.

    What looks like a body in base64 is looked into, also where it begins or ends too soon. Where it cannot be told,
    as in what is compressed and damaged, it may.
    """
    if len(raw) > MAX_SEARCHED_BYTES:
        return True
    raw = _unescaped(raw).replace(b"\\/", b"/")
    if FORBIDS_STORING.search(raw):
        return True
    decompressed_some = False
    for body in _bodies(raw):
        if body[:2] in ZLIB_BEGINNINGS:
            try:
                body = _decompress(body, ZLIB)
            except MalformedMessage:
                return True
            decompressed_some = True
        if FORBIDS_STORING.search(_unescaped(body)):
            return True
    return bool(COMPRESSED.search(raw)) and not decompressed_some


def _unescaped(json_text: bytes) -> bytes:
    return ESCAPED_ASCII.sub(lambda escape: bytes([int(escape[1], 16)]), json_text)


def _bodies(raw: bytes) -> Iterator[bytes]:
    """What stands in base64 in it; a part whose beginning is lost may begin anywhere."""
    for part in BASE64.findall(raw):
        for start in range(4):
            whole = (len(part) - start) // 4 * 4
            yield binascii.a2b_base64(part[start : start + whole])


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
