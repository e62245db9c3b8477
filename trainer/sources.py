"""Where labelled rows come from: a CSV file, a folder as Kaggle ships the Jigsaw challenge, or the Hugging Face hub."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from config.comment import checked_text
from config.names import LABELS
from config.settings import HUB_PREFIX, TrainerSettings
from config.table_files import AS_FOUND, Form, quoted
from trainer.dataset import (
    NO_COLUMNS,
    TEXT_COLUMN,
    Columns,
    Dataset,
    DatasetError,
    find_columns,
    from_frame,
    read_csv,
    read_frame,
)

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

HUB_SOURCE = re.compile(rf"{HUB_PREFIX}(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<split>.+))?")
ARCHIVES = ("", ".zip", ".gz")
"""What may follow `train.csv`: Kaggle ships each file in an archive of its own."""
PLACE = "place in the file"
NOT_SCORED = "-1"
"""In the challenge's test_labels.csv: a row that did not count."""


def read_source(
    source: str, *, columns: Columns = NO_COLUMNS, positive_from: float = 0.5, form: Form = AS_FOUND
) -> Dataset:
    """The labelled rows of one source.

    - A file of any kind that `config.table_files` reads, or standard input, "-". The Jigsaw challenge's test.csv is
      joined with the test_labels.csv beside it.
    - A folder with the Jigsaw challenge's files: its train.csv, never its test rows.
    - `hub:OWNER/NAME` or `hub:OWNER/NAME:SPLIT`, from the Hugging Face hub; the split is `train` where none is named.

    Args:
        positive_from: a label given as a share of annotators is positive from here.
        form: how files are read, and what becomes of their bad rows.

    Raises:
        DatasetError: there is no such source, or it cannot be read as rows of text and labels.
    """
    if source.startswith(HUB_PREFIX):
        return _read_hub(source, columns, positive_from, form)
    path = Path(source)
    if path.is_dir():
        path = _file(path, "train.csv")
    elif path.name.startswith("test.csv") and (labels := _find(path.parent, "test_labels.csv")):
        return _read_test(path, labels, form)
    return read_csv(path, columns=columns, positive_from=positive_from, form=form)


def read_sources(settings: TrainerSettings, form: Form = AS_FOUND) -> list[Dataset]:
    """The training rows that the settings name, source by source. Raises as `read_source`."""
    return [
        read_source(source, columns=settings.columns, positive_from=settings.positive_from, form=form)
        for source in settings.train_files
    ]


def read_holdout(settings: TrainerSettings, form: Form = AS_FOUND) -> Dataset:
    """The held-out rows that the settings name. Raises as `read_source`."""
    source = str(settings.holdout_file)
    return read_source(source, columns=settings.columns, positive_from=settings.positive_from, form=form)


# --- The Jigsaw challenge ---


def _find(folder: Path, name: str) -> Path | None:
    return next((path for ending in ARCHIVES if (path := folder / f"{name}{ending}").is_file()), None)


def _file(folder: Path, name: str) -> Path:
    if found := _find(folder, name):
        return found
    raise DatasetError(f"the folder {folder} has no {name}, nor {name}.zip or {name}.gz; name a CSV file itself")


def _read_test(test: Path, test_labels: Path, form: Form) -> Dataset:
    """The scored rows of the challenge's test set, joined by id."""
    texts, labels = _by_id(test, (TEXT_COLUMN,), form), _by_id(test_labels, LABELS, form)
    for one, other, there, not_there in ((labels, texts, test_labels, test), (texts, labels, test, test_labels)):
        if len(missing := one.index.difference(other.index)):
            raise DatasetError(
                f"id {quoted(missing[0])} is in {there} but not in {not_there}; are they of one download?"
            )
    labels = labels.loc[texts.index, list(LABELS)]
    scored = (labels != NOT_SCORED).any(axis=1)
    rows = texts.join(labels.replace(NOT_SCORED, "")).set_index(PLACE)
    return from_frame(rows[scored.to_numpy()], str(test), columns={}, positive_from=0.5, form=form)


def _by_id(path: Path, columns: tuple[str, ...], form: Form) -> pd.DataFrame:
    frame = read_frame(path, form)
    if lacking := [column for column in ("id", *columns) if column not in frame]:
        raise DatasetError(f"{path} has no column {lacking[0]!r}, which the Jigsaw challenge's file of this name has")
    if len(twice := frame.index[frame.id.duplicated()]):
        raise DatasetError(f"{path}, {twice[0]}: its id {quoted(frame.id[twice[0]])} was there before")
    return frame.rename_axis(PLACE).reset_index().set_index("id")


# --- The hub ---


def _read_hub(source: str, columns: Columns, positive_from: float, form: Form) -> Dataset:
    """A split of a dataset on the hub. It stays on disk as Arrow; what comes into memory are its texts and labels."""
    match = HUB_SOURCE.fullmatch(source)
    if not match:
        raise DatasetError(
            f"{source} is no dataset's name; write {HUB_PREFIX}OWNER/NAME, or {HUB_PREFIX}OWNER/NAME:SPLIT"
        )
    try:
        import datasets
    except ModuleNotFoundError:
        raise DatasetError(
            f"{source} needs the datasets library, which is not installed: pip install datasets"
        ) from None
    try:
        # Data files only: code in a repository is never run.
        split = datasets.load_dataset(match["name"], split=match["split"] or "train")
    except ConnectionError as error:
        why = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise DatasetError(
            f"{source} is not in this machine's cache, and {why} ({error}). Load it once with a network, or name a CSV"
        ) from None
    except Exception as error:  # the library raises what its many parts do
        raise DatasetError(f"{source} cannot be loaded: {error}") from None
    found = find_columns(split.column_names, source, columns)
    frame = _as_text(split, found)
    frame.index = [f"row {number}" for number in range(len(frame))]
    usable = frame[[_is_usable(text) for text in frame[TEXT_COLUMN]]]
    if left_out := len(frame) - len(usable):
        # Nobody can mend them there.
        logger.warning("%s: %d of %d rows hold no text, or one too long; left out", source, left_out, len(frame))
    return from_frame(usable, source, columns={}, positive_from=positive_from, form=form)


def _as_text(split: "datasets.Dataset", found: Mapping[str, str]) -> pd.DataFrame:
    """The columns we know, by our names, as a CSV would hold them."""
    frame = split.select_columns(list(dict.fromkeys(found.values()))).to_pandas()
    frame = pd.DataFrame({ours: frame[theirs] for ours, theirs in found.items()})
    return frame.map(_written)


def _written(value: object) -> str:
    if isinstance(value, (bool, float, int, np.number)):
        return "" if math.isnan(value) else str(float(value))
    return "" if value is None else str(value)


def _is_usable(text: str) -> bool:
    try:
        checked_text(text)
    except ValueError:
        return False
    return True
