"""The envelope that kombu writes around a message's body: read with every bound, or replaced where it is broken.

Owns what may reach a consumer. Pure: bytes in, an envelope out.
"""

import binascii
import hashlib
import json
import zlib
from typing import Any

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
    if compression != "application/x-gzip":
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
        "body": raw[:MALFORMED_BODY_BYTES],
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "headers": headers,
        "properties": {"body_encoding": None},
    }
