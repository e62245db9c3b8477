"""Our worker with a tokenizer that fails on "poison", and quotes the text when it does, as libraries may."""

from collections.abc import Sequence

from model.engine import Scorer
from worker.celery import app

__all__ = ["app"]

_encode = Scorer.encode_readable


def _encode_or_quote(self: Scorer, texts: Sequence[str]) -> object:
    for text in texts:
        if "poison" in text:
            raise ValueError(f"cannot tokenize {text!r}")
    return _encode(self, texts)


Scorer.encode_readable = _encode_or_quote  # type: ignore[assignment, method-assign]
