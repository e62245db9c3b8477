"""Labelled texts for training and judging: read from CSV and from people's corrections, checked, hashed.

A label that is blank is unknown, never zero; it is NaN here and masked in the loss.
"""

import hashlib
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from config.names import LABELS
from model.text import normalise

TEXT_COLUMN = "comment_text"


class DatasetError(Exception):
    """Data that cannot be trained on; the message names the file, the row and the column."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Texts, their labels and how much each row counts.

    Attributes:
        labels: (texts, 6) in the order of `LABELS`, from 0 to 1, NaN where unknown.
        weights: (texts,), of each row in the loss; all 1 where none are given.
    """

    texts: list[str]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32] = field(default_factory=lambda: np.ones(0, dtype=np.float32))

    def __post_init__(self) -> None:
        if not len(self.weights):
            object.__setattr__(self, "weights", np.ones(len(self.texts), dtype=np.float32))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Of every text and label, in order; and of every weight, where one is not 1."""
        digest = hashlib.sha256()
        for text, row in zip(self.texts, self.labels, strict=True):
            digest.update(text.encode())
            digest.update(row.tobytes())
        if (self.weights != 1).any():
            digest.update(self.weights.tobytes())
        return digest.hexdigest()

    def take(self, indexes: Sequence[int]) -> "Dataset":
        rows = list(indexes)
        return Dataset([self.texts[row] for row in rows], self.labels[rows], self.weights[rows])

    def describe(self) -> dict[str, object]:
        """Rows, and per label how many are known to be positive and negative, for the manifest."""
        return {
            "rows": len(self),
            "sha256": self.sha256,
            "positives": {label: int((self.labels[:, i] == 1).sum()) for i, label in enumerate(LABELS)},
            "negatives": {label: int((self.labels[:, i] == 0).sum()) for i, label in enumerate(LABELS)},
        }


def read_csv(path: Path) -> Dataset:
    """Rows of a CSV (gzip too) with a `comment_text` column and any of the label columns, 0, 1 or blank.

    Raises:
        DatasetError: the file cannot be read, a column is missing, or a value is not allowed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # Where rows have more fields than the header, pandas would take the first for row names, or drop the last.
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", index_col=False)
    except (OSError, ValueError, EOFError, zlib.error, pd.errors.ParserWarning) as error:
        raise DatasetError(f"{path} cannot be read as CSV: {error}") from None
    if TEXT_COLUMN not in frame:
        raise DatasetError(f"{path} has no column {TEXT_COLUMN!r}; it has {', '.join(map(repr, frame.columns))}")
    if not set(LABELS) & set(frame.columns):
        raise DatasetError(f"{path} has none of the label columns {', '.join(LABELS)}")
    labels = np.full((len(frame), len(LABELS)), np.nan, dtype=np.float32)
    for column, label in enumerate(LABELS):
        if label in frame:
            labels[:, column] = _label_values(frame[label], path, label)
    texts = frame[TEXT_COLUMN].tolist()
    if empty := [row for row, text in enumerate(texts) if not text.strip()]:
        raise DatasetError(f"{path}, row {empty[0] + 2}: {TEXT_COLUMN} is empty")
    return Dataset(texts, labels)


def from_corrections(corrections: Iterable[tuple[str, Mapping[str, bool | None]]]) -> Dataset:
    """Rows of people's reviews: each text with the labels that were said of it."""
    rows = list(corrections)
    labels = np.array(
        [[np.nan if said.get(label) is None else float(bool(said[label])) for label in LABELS] for _, said in rows],
        dtype=np.float32,
    ).reshape(len(rows), len(LABELS))
    return Dataset([text for text, _ in rows], labels)


def training_set(
    replayed: Dataset, corrections: Dataset, holdout: Dataset, *, max_rows: int, correction_repeats: int, seed: int
) -> Dataset:
    """What a run trains on: a seeded draw of the replayed rows, and every correction several times.

    A row whose text is held out is dropped, or the gate would judge what was learnt by heart. A correction
    replaces a replayed row of the same text.
    """
    held_out = {_key(text) for text in holdout.texts}
    corrected = {_key(text) for text in corrections.texts}
    usable = [
        index for index, key in enumerate(map(_key, replayed.texts)) if key not in held_out and key not in corrected
    ]
    order = np.random.default_rng(seed).permutation(usable)
    drawn = replayed.take([int(index) for index in (order[:max_rows] if max_rows else order)])
    kept = corrections.take([i for i, text in enumerate(corrections.texts) if _key(text) not in held_out])
    return concatenate([drawn, *[kept] * correction_repeats])


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    none = np.empty((0, len(LABELS)), dtype=np.float32)  # there may be no training files, only corrections
    labels = np.concatenate([none, *(part.labels for part in parts)])
    weights = np.concatenate([none[:, 0], *(part.weights for part in parts)])
    return Dataset([text for part in parts for text in part.texts], labels, weights)


def _key(text: str) -> str:
    """Equal for texts that differ in case, spacing or look-alike forms only."""
    return " ".join(normalise(text).lower().split())


def _label_values(column: "pd.Series[str]", path: Path, label: str) -> NDArray[np.float32]:
    values = column.str.strip().replace("", "nan")
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float32)
    wrong = ~(np.isin(numbers, (0, 1)) | (values == "nan").to_numpy())
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        # Where the columns are shifted the value is a comment, which must not reach a log.
        value = (
            shown if len(shown := repr(column.iloc[row])) <= 16 else f"a value of {len(column.iloc[row]):,} characters"
        )
        raise DatasetError(f"{path}, row {row + 2}, column {label}: {value} is not 0, 1 or blank")
    return numbers
