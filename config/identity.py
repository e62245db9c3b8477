"""What an id means: which submission a comment is. Pure; client and worker agree on it without asking each other.

A submission has a name: its idempotency key, or `<task id>:<n>` where the producer gave none. A name belongs to a
community: two communities may use the same one. The id is made of both, and is the name itself wherever it can be.
"""

import hashlib
import re
from typing import Any

from config.names import DEFAULT_COMMUNITY, MAX_ID_CHARS

TEXT_HASH_CHARS = 16
"""Hexadecimal digits of a text's sha256 that tell the texts under one id apart."""
ENDS_LIKE_A_LETTER = re.compile(rf"#([0-9a-f]{{{TEXT_HASH_CHARS}}}|refused)\Z")
"""How `id_of_text` and `refused_id` end. No submission that a producer names has such an id."""


class SubmissionId(str):
    """An id as `submit` returns it: it also knows which text was submitted under it."""

    __slots__ = ("community", "text_hash")

    community: str
    text_hash: str
    """The first TEXT_HASH_CHARS digits of the text's sha256."""

    def __new__(cls, submission_id: str, community: str, text_hash: str) -> "SubmissionId":
        made = super().__new__(cls, submission_id)
        made.community, made.text_hash = community, text_hash
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SubmissionId, (str(self), self.community, self.text_hash)


def submission_id(community: str, name: str) -> str:
    """The id of the submission that a community has under this name. Different ones never have the same id.

    It is the name itself in the community `default`, unless that holds a slash; else `<community>/<name>`, with `%` and
    `/` in the community escaped as in a URL. Where that is longer than an id may be, or ends like a letter's, it is
    `%/` and its sha256: no escaped community is a single `%`.
    """
    full = name if community == DEFAULT_COMMUNITY and "/" not in name else f"{_escaped(community)}/{name}"
    return _hashed(full) if len(full) > MAX_ID_CHARS or ENDS_LIKE_A_LETTER.search(name) else full


def community_and_name(submission_id: str) -> tuple[str, str] | None:
    """What `submission_id` made the id of, where it wrote both out; None where the id is a name itself, or a hash."""
    community, slash, name = submission_id.partition("/")
    if not slash or community == "%":
        return None
    return community.replace("%2F", "/").replace("%25", "%"), name


def id_of_text(submission_id: str, text_sha256: str) -> str:
    """The id of a submission whose own id belongs to another text already: `<id>#<hash>`.

    It is set aside under it, and decided under it where an operator retries that.
    """
    full = f"{submission_id}#{text_sha256[:TEXT_HASH_CHARS]}"
    # What `submission_id` hashes never begins with a slash.
    return _hashed(f"/{full}") if len(full) > MAX_ID_CHARS else full


def refused_id(name: str) -> str:
    """The id of the dead letter of what could not be read, so that no submission stands behind it.

    Args:
        name: `<message id>:<n>`, or the id of a whole message.
    """
    return f"{name}#refused"


def refused_name(dead_letter_id: str) -> str:
    """The name in the id that `refused_id` made; older releases used the name alone."""
    return dead_letter_id.removesuffix("#refused")


def _escaped(community: str) -> str:
    return community.replace("%", "%25").replace("/", "%2F")


def _hashed(full: str) -> str:
    return f"%/{hashlib.sha256(full.encode()).hexdigest()}"
