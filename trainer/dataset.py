"""Labelled texts for training and judging: rows and their checks, CSV files, people's corrections, duplicates, hashes.

A label that is blank is unknown, never zero; it is NaN here and masked in the loss.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from config.comment import checked_text
from config.names import LABELS, TEXT_COLUMNS
from config.table_files import AS_FOUND, TELLING_NAME, BadRow, Form, TableError, as_text, listed, open_table
from model.text import normalise

TEXT_COLUMN, OTHER_TEXT_COLUMN = TEXT_COLUMNS
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TELLING_VALUE = re.compile(r"[-+.,%\deE]{1,12}|(?i:true|false|yes|no|nan|none|null)")
"""What may be quoted of a wrong label: anything else may be a comment in the wrong column, and must not reach a log."""
BOOLEANS = {"true": "1", "yes": "1", "false": "0", "no": "0"}
ASCII_BUT_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalpha())

Columns = Mapping[Any, str]
"""What a table calls its columns where it does not call them as we do: our name, its name."""
NO_COLUMNS: Columns = {}


class DatasetError(Exception):
    """Data that cannot be trained on; the message names the file, the row and the column, and quotes no text."""


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

    def take(self, indexes: Sequence[int] | NDArray[np.intp]) -> "Dataset":
        indexes = np.asarray(indexes, dtype=np.intp)
        return Dataset([self.texts[index] for index in indexes], self.labels[indexes], self.weights[indexes])

    def describe(self) -> dict[str, Any]:
        """Rows, hash, lengths, and per label how many are positive, negative and unknown. JSON-ready."""
        lengths = np.array([len(text) for text in self.texts] or [0])
        quantiles = np.quantile(lengths, QUANTILES, method="lower")
        return {
            "rows": len(self),
            "sha256": self.sha256,
            "positives": {label: int((self.labels[:, i] == 1).sum()) for i, label in enumerate(LABELS)},
            "negatives": {label: int((self.labels[:, i] == 0).sum()) for i, label in enumerate(LABELS)},
            "unknown": {label: int(np.isnan(self.labels[:, i]).sum()) for i, label in enumerate(LABELS)},
            "characters": {
                **{f"{share:.0%}": int(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
                "longest": int(lengths.max()),
            },
        }


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    # There may be no training files, only corrections.
    parts = [Dataset([], np.empty((0, len(LABELS)), dtype=np.float32)), *parts]
    return Dataset(
        [text for part in parts for text in part.texts],
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.weights for part in parts]),
    )


# --- Files ---


def read_csv(
    path: Path | str, *, columns: Columns = NO_COLUMNS, positive_from: float = 0.5, form: Form = AS_FOUND
) -> Dataset:
    """Rows of a file, of any kind that `config.table_files` reads, with a `comment_text` and any of the label columns.

    Args:
        positive_from: labels are 0, 1, blank, or the share of annotators who said so, which is positive from here.

    Raises:
        DatasetError: the file cannot be read, a column is missing, or a value is not allowed.
    """
    frame = read_frame(path, form)
    return from_frame(frame, str(path), columns=columns, positive_from=positive_from, form=form)


def read_frame(path: Path | str, form: Form = AS_FOUND) -> pd.DataFrame:
    """Every value of a file, as text; the index names each row's place, as "line 2".

    Raises:
        DatasetError: the file cannot be read, or one of its rows.
    """
    try:
        with open_table(path, form) as table:
            places: list[str] = []
            columns: dict[str, list[str]] = {name: [] for name in table.columns}
            for row in table:
                for name in [name for name in row.values if name not in columns]:
                    columns[name] = [""] * len(places)
                for name, values in columns.items():
                    values.append(as_text(row.values.get(name)))
                places.append(table.place(row))
    except TableError as error:
        raise DatasetError(str(error)) from None
    return pd.DataFrame(columns, index=places, dtype=object)


def from_frame(
    frame: pd.DataFrame, source: str, *, columns: Columns, positive_from: float, form: Form = AS_FOUND
) -> Dataset:
    """Rows of a table of text values, checked. See `read_csv`.

    Args:
        frame: its index names each row's place, as messages say it.
        source: what messages call the table.

    Raises:
        DatasetError: a column is missing, or a value is not allowed and its row not to be left out.
    """
    found = find_columns(list(frame.columns), source, columns)
    labels = np.full((len(frame), len(LABELS)), np.nan, dtype=np.float32)
    faults: dict[int, str] = {}
    for index, label in enumerate(LABELS):
        if label not in found:
            continue
        values = frame[found[label]].str.strip()
        numbers = values.str.lower().replace(BOOLEANS).replace("", "nan")
        shares = pd.to_numeric(numbers, errors="coerce").to_numpy(dtype=np.float32)
        for row in np.flatnonzero(~((shares >= 0) & (shares <= 1) | (values == "").to_numpy())).tolist():
            value = values.iloc[row]
            shown = repr(value) if TELLING_VALUE.fullmatch(value) else f"a value of {len(value):,} characters"
            faults.setdefault(
                row,
                f"{found[label]}: {shown} is not 0, 1, true, false, a share between them, or blank for unknown",
            )
        labels[:, index] = np.where(np.isnan(shares), np.nan, shares >= positive_from)
    texts = frame[found[TEXT_COLUMN]].tolist()
    for row, text in enumerate(texts):
        try:
            checked_text(text)
        except ValueError as error:
            faults.setdefault(row, f"{found[TEXT_COLUMN]}: {error}")
    for row in sorted(faults):
        try:
            form.refuse(f"{source}, {frame.index[row]}, column {faults[row]}")
        except BadRow as error:
            raise DatasetError(str(error)) from None
    rows = Dataset(texts, labels)
    return rows.take([row for row in range(len(rows)) if row not in faults]) if faults else rows


def find_columns(names: Sequence[str], source: str, columns: Columns) -> dict[str, str]:
    """Which column holds the text and each label that the table has: our name, its name.

    A table that has none of the columns in `columns`, but our own, may stand among others that have them.

    Raises:
        DatasetError: there is no text, no label, or not the column that `columns` names.
    """
    has = listed(names)
    if TEXT_COLUMN in names and not set(columns.values()) & set(names):
        columns = {}
    if TEXT_COLUMN not in names and OTHER_TEXT_COLUMN in names:
        columns = {TEXT_COLUMN: OTHER_TEXT_COLUMN, **columns}
    found = {}
    for ours in (TEXT_COLUMN, *LABELS):
        theirs = columns.get(ours, ours)
        if theirs in names:
            found[ours] = theirs
        elif ours in columns:
            near = [name for name in difflib.get_close_matches(theirs, names, n=1) if TELLING_NAME.fullmatch(name)]
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DatasetError(f"{source} has no column {theirs!r}, which is to be {ours}; {hint}It has {has}")
    if TEXT_COLUMN not in found:
        raise DatasetError(
            f"{source} has no column {TEXT_COLUMN!r}; it has {has}. Name it by the setting trainer.columns, "
            f"or by --columns {TEXT_COLUMN}=ITS_NAME"
        )
    if len(found) == 1:
        raise DatasetError(
            f"{source} has none of the label columns {', '.join(LABELS)}; it has {has}. Name one by the setting "
            "trainer.columns, or by --columns toxic=ITS_NAME"
        )
    return found


# --- Corrections ---


def from_corrections(corrections: Iterable[tuple[str, Mapping[str, bool | None], float]]) -> Dataset:
    """Rows of people's reviews: each text with the labels that were said of it, and the review's weight."""
    rows = list(corrections)
    labels = np.array(
        [[np.nan if said.get(label) is None else float(bool(said[label])) for label in LABELS] for _, said, _ in rows],
        dtype=np.float32,
    ).reshape(len(rows), len(LABELS))
    return Dataset([text for text, _, _ in rows], labels, np.array([weight for *_, weight in rows], dtype=np.float32))


# --- Duplicates ---


def text_key(text: str) -> str:
    """Equal for texts that differ in case, spacing or look-alike forms only."""
    return " ".join(normalise(text).lower().split())


def near_key(key: str) -> str:
    """Equal for texts of the same letters in the same order: no split may have one on either side.

    Args:
        key: a text's `text_key`, which it stays where there are no letters.
    """
    letters = key.encode().translate(None, ASCII_BUT_LETTERS).decode()
    return (letters if letters.isascii() else "".join(filter(str.isalpha, letters))) or key


def merge_duplicates(dataset: Dataset, keys: NDArray[np.object_]) -> tuple[Dataset, NDArray[np.intp], dict[str, int]]:
    """One row for each key, in the order in which they come.

    Where labels of one text contradict each other the weighted majority counts, and a tie is unknown. The weight is
    the rows' mean.

    Returns:
        The rows; where each was first; and per label how many were contradictory.
    """
    groups, unique = pd.factorize(keys)
    _, first = np.unique(groups, return_index=True)
    shape = (len(unique), len(LABELS))
    highest, lowest = np.full(shape, np.nan, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
    np.fmax.at(highest, groups, dataset.labels)
    np.fmin.at(lowest, groups, dataset.labels)
    votes, votes_for = np.zeros(shape), np.zeros(shape)
    known = ~np.isnan(dataset.labels)
    np.add.at(votes, groups, known * dataset.weights[:, None])
    np.add.at(votes_for, groups, np.nan_to_num(dataset.labels) * dataset.weights[:, None])
    majority = np.where(np.isclose(votes_for * 2, votes), np.nan, votes_for * 2 > votes)
    contradictory = highest > lowest
    merged = Dataset(
        [dataset.texts[index] for index in first],
        np.where(contradictory, majority, highest).astype(np.float32),
        (np.bincount(groups, dataset.weights) / np.bincount(groups)).astype(np.float32),
    )
    return merged, first, dict(zip(LABELS, contradictory.sum(axis=0).tolist(), strict=True))
