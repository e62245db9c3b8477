"""From text to token ids: normalisation and tokenisation, the same in training and in service."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids with the encoder's special tokens; `truncated` where the text went on beyond them."""

    ids: list[int]
    truncated: bool


def normalise(text: str) -> str:
    """The text as the model sees it: NFKC, which undoes full-width, circled and mathematical look-alike letters.

    https://unicode.org/reports/tr15/
    """
    return unicodedata.normalize("NFKC", text)


class TextEncoder:
    """The tokenizer of one model version.

    Raises:
        Exception: the tokenizer file cannot be read (the tokenizers library has no narrower class).
    """

    def __init__(self, directory: Path, max_length: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Token ids of each text, cut at the version's `max_length`; uses every core for long lists."""
        encodings = self._tokenizer.encode_batch([normalise(text) for text in texts])
        return [EncodedText(encoding.ids, bool(encoding.overflowing)) for encoding in encodings]
