"""Labelled texts: what a file may hold, and what a run trains on."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from config.names import LABELS
from trainer.dataset import Dataset, DatasetError, concatenate, from_corrections, read_csv, training_set

UNKNOWN = math.nan
HEADER = "comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate"


def dataset(*texts: str, toxic: float = 0.0) -> Dataset:
    return Dataset(list(texts), np.full((len(texts), 6), toxic, dtype=np.float32))


NOTHING = Dataset([], np.empty((0, 6), dtype=np.float32))


def drawn(
    replayed: Dataset, corrections: Dataset = NOTHING, holdout: Dataset = NOTHING, *, max_rows: int = 0, seed: int = 1
) -> Dataset:
    return training_set(replayed, corrections, holdout, max_rows=max_rows, correction_repeats=3, seed=seed)


# --- Files ---


def test_a_blank_label_is_unknown_and_not_zero(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'id,{HEADER}\n7,"two\nlines, one comma",1,0,,,1.0, \n8,"NA",0,,,,,\n', encoding="utf-8")
    read = read_csv(path)
    assert read.texts == ["two\nlines, one comma", "NA"]
    np.testing.assert_array_equal(read.labels, [[1, 0, UNKNOWN, UNKNOWN, 1, UNKNOWN], [0] + [UNKNOWN] * 5])


def test_labels_that_the_file_lacks_are_unknown_and_its_order_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress("insult,comment_text,spam\n1,ä,9\n".encode()))
    read = read_csv(path)
    assert read.texts == ["ä"]
    assert read.labels[0, LABELS.index("insult")] == 1
    assert np.isnan(read.labels).sum() == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"comment_text,toxic\nfine,1\nnot,2\n", r"row 3, column toxic: '2' is not 0, 1 or blank", id="2"),
        pytest.param(b"comment_text,threat\nx,yes\n", r"row 2, column threat: 'yes'", id="word"),
        pytest.param(b"comment_text,toxic\nx,0.5\n", r"row 2, column toxic: '0\.5'", id="fraction"),
        pytest.param(b"comment_text,toxic\nx,NaN\n", r"row 2, column toxic: 'NaN'", id="NaN"),
        pytest.param(b"comment_text,toxic\nx,-1\n", r"row 2, column toxic: '-1'", id="negative"),
        pytest.param(b"comment_text,toxic\nx,1\n\xe2\x80\x83,1\n", r"row 3: comment_text is empty", id="blank text"),
        pytest.param(b"text,toxic\nx,1\n", r"no column 'comment_text'; it has 'text', 'toxic'", id="no text"),
        pytest.param(b"comment_text,spam\nx,1\n", r"none of the label columns toxic", id="no labels"),
        pytest.param(b"comment_text,toxic\nx,1\ny,1,1\n", r"cannot be read as CSV: .* line 3", id="too many fields"),
        pytest.param(b"comment_text,toxic\nwell, I,1\n", r"as CSV: Length of header", id="unquoted comma"),
        pytest.param(b'comment_text,toxic\n"x,1\n', r"cannot be read as CSV", id="unclosed quote"),
        pytest.param(b"comment_text,toxic\n\xe4,1\n", r"cannot be read as CSV: 'utf-8'", id="Latin-1"),
        pytest.param(b"", r"cannot be read as CSV", id="empty"),
    ],
)
def test_a_wrong_file_is_refused_by_name_row_and_column(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{path}.*{said}"):
        read_csv(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"comment_text,toxic\nx,1\n", id="not compressed"),
        pytest.param(gzip.compress(b"comment_text,toxic\nx,1\n")[:-10], id="cut short"),
        pytest.param(gzip.compress(b"comment_text,toxic\nx,1\n")[:12] + b"damage" * 5, id="damaged"),
    ],
)
def test_a_damaged_archive_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{path} cannot be read as CSV"):
        read_csv(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"missing\.csv cannot be read as CSV: .*No such file"):
        read_csv(tmp_path / "missing.csv")


# --- What a run trains on ---


def test_a_review_says_only_what_its_reviewer_said() -> None:
    read = from_corrections([("bad", {"toxic": True, "insult": False, "threat": None})])
    np.testing.assert_array_equal(read.labels, [[1, UNKNOWN, UNKNOWN, UNKNOWN, 0, UNKNOWN]])
    assert from_corrections([]).labels.shape == (0, 6)


@pytest.mark.parametrize("variant", ["You  IDIOT", " you idiot\n", "ｙｏｕ ｉｄｉｏｔ", "𝐲𝐨𝐮 idiot"])
def test_a_text_that_is_held_out_is_not_trained_on(variant: str) -> None:
    # Given a held-out text that occurs in another spelling among the replayed rows and the corrections
    trained = drawn(dataset("hello", variant), dataset(variant, "thanks", toxic=1), holdout=dataset("you idiot"))
    # Then the gate will not judge what was learnt by heart
    assert trained.texts == ["hello", "thanks", "thanks", "thanks"]


@pytest.mark.parametrize("variant", ["you idiot", "You  IDIOT", "ｙｏｕ ｉｄｉｏｔ"])
def test_a_correction_replaces_the_row_it_corrects(variant: str) -> None:
    trained = drawn(dataset("hello", variant, toxic=0), dataset("you idiot", toxic=1))
    assert trained.texts == ["hello", "you idiot", "you idiot", "you idiot"]
    assert trained.labels[:, 0].tolist() == [0, 1, 1, 1]


def test_rows_are_drawn_by_the_seed_and_corrections_are_all_kept() -> None:
    rows, corrections = dataset(*(f"row {n}" for n in range(100))), dataset("a", "b")
    first, again, other = (drawn(rows, corrections, max_rows=10, seed=seed) for seed in (1, 1, 2))
    assert len(first) == 10 + 3 * 2
    assert first.texts == again.texts
    assert set(first.texts[:10]) != set(other.texts[:10])
    assert len(drawn(rows)) == 100


def test_there_may_be_corrections_only() -> None:
    assert drawn(concatenate([]), dataset("a")).texts == ["a"] * 3
    assert len(drawn(concatenate([]))) == 0


# --- Hash ---


def test_the_hash_is_of_texts_labels_and_their_order() -> None:
    data = concatenate([dataset("a", toxic=0), dataset("b", toxic=1), dataset("c", toxic=UNKNOWN)])
    assert data.sha256 == data.take(range(3)).sha256
    others = [
        data.take([1, 0, 2]),
        data.take([0, 1]),
        Dataset(["a", "b", "d"], data.labels),
        Dataset(data.texts, np.nan_to_num(data.labels)),
        Dataset(data.texts, data.labels[::-1].copy()),
    ]
    assert len({other.sha256 for other in [data, *others]}) == 6


def test_a_description_counts_what_is_known() -> None:
    described = concatenate([dataset("a", "b", toxic=1), dataset("c"), dataset("d", toxic=UNKNOWN)]).describe()
    assert described["rows"] == 4
    assert described["positives"] == dict.fromkeys(LABELS, 2)
    assert described["negatives"] == dict.fromkeys(LABELS, 1)
