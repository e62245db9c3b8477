"""Labelled texts: what a file may hold, which texts are the same, and their hash."""

import gzip
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS
from config.settings import ROOT
from config.table_files import BadRow, Form
from trainer.dataset import (
    Dataset,
    DatasetError,
    concatenate,
    from_corrections,
    merge_duplicates,
    near_key,
    read_csv,
    text_key,
)

UNKNOWN = math.nan
HEADER = "comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate"


def dataset(*texts: str, toxic: float = 0.0) -> Dataset:
    return Dataset(list(texts), np.full((len(texts), 6), toxic, dtype=np.float32))


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
        pytest.param(b"comment_text,toxic\nfine,1\nnot,2\n", r"line 3, column toxic: '2' is not 0, 1, true", id="2"),
        pytest.param(b"comment_text,threat\nx,maybe\n", r"line 2, column threat: a value of 5", id="word"),
        pytest.param(b"comment_text,toxic\nx,1.5\n", r"line 2, column toxic: '1\.5'", id="more than all"),
        pytest.param(b"comment_text,toxic\n1,you twit\n", r"toxic: a value of 8 characters is not", id="shifted"),
        pytest.param(b"comment_text,toxic\nx,NaN\n", r"line 2, column toxic: 'NaN'", id="NaN"),
        pytest.param(b"comment_text,toxic\nx,-1\n", r"line 2, column toxic: '-1'", id="negative"),
        pytest.param(b"comment_text,toxic\nx,1\n\xe2\x80\x83,1\n", r"line 3, column comment_text: is emp", id="blank"),
        pytest.param(b"comment_text,toxic\nx\0y,1\n", r"line 2, column comment_text: holds a NUL", id="NUL"),
        pytest.param(b"comment_text,toxic\n" + b"x" * 20_481 + b",1\n", r"line 2, .* has 20,481 bytes", id="too long"),
        pytest.param(b"you stupid fool,1\n", r"no column 'comment_text'; it has one of 15 char", id="no header"),
        pytest.param(b"body,toxic\nx,1\n", r"no column 'comment_text'; it has 'body', 'toxic'", id="no text"),
        pytest.param(b"comment_text,spam\nx,1\n", r"none of the label columns toxic", id="no labels"),
        pytest.param(b"comment_text,toxic\nx,1\ny,1,1\n", r"line 3: has 3 fields", id="too many fields"),
        pytest.param(b"comment_text,toxic\nwell, I,1\n", r"line 2: has 3 fields", id="unquoted comma"),
        pytest.param(b'comment_text,toxic\n"x,1\n', r"line 2: .* never closed", id="unclosed quote"),
        pytest.param(b"comment_text,toxic\n\xe4,1\n", r"line 2: is not UTF-8", id="Latin-1"),
        pytest.param(b"", r"is empty", id="empty"),
    ],
)
def test_a_wrong_file_is_refused_by_name_row_and_column(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{path}.*{said}"):
        read_csv(path)


def test_columns_may_have_other_names_and_labels_be_shares_of_annotators(tmp_path: Path) -> None:
    path = tmp_path / "civil.csv"
    path.write_text("\ufeffbody, target,insult\nx,0.5,0.2\ny,0.49,\n", encoding="utf-8")
    read = read_csv(path, columns={"comment_text": "body", "toxic": "target"})
    assert read.texts == ["x", "y"]
    np.testing.assert_array_equal(read.labels[:, [0, 4]], [[1, 0], [0, UNKNOWN]])
    assert read_csv(path, columns={"comment_text": "body", "toxic": "target"}, positive_from=0.2).labels[1, 0] == 1
    for wrong in ({"toxic": "traget"}, {"toxic": "traget", "insult": "insult"}):
        with pytest.raises(DatasetError, match=r"no column 'traget', which is to be toxic; did you mean 'target'\?"):
            read_csv(path, columns={"comment_text": "body"} | wrong)


def test_other_files_and_what_is_left_out_of_them(tmp_path: Path) -> None:
    # Given JSON lines of which the first has fewer names, with booleans and what no training can use
    path, bad = tmp_path / "rows.jsonl", list[BadRow]()
    rows = [{"text": "a", "toxic": True}, {"text": "b", "insult": None, "threat": 0.7}, {"text": " "}, {"text": "c"}]
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "d", "toxic": "?"}])), encoding="utf-8")
    read = read_csv(path, form=Form(on_bad_row=bad.append))
    # Then what can be used is used, and the rest is named by its line
    assert read.texts == ["a", "b", "c"]
    np.testing.assert_array_equal(
        read.labels[:, [0, 3, 4]], [[1, UNKNOWN, UNKNOWN], [UNKNOWN, 1, UNKNOWN], [UNKNOWN] * 3]
    )
    assert [re.findall(r"line \d", str(row)) for row in bad] == [["line 3"], ["line 5"]]
    (tmp_path / "rows.csv").write_text("comment_text,toxic\nx,True\ny,no\n")
    assert read_csv(tmp_path / "rows.csv").labels[:, 0].tolist() == [1, 0]


def test_a_file_with_our_names_may_stand_among_others(tmp_path: Path) -> None:
    path = tmp_path / "ours.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ours.csv", "comment_text,toxic\nx,1\n")
    assert read_csv(path, columns={"comment_text": "body", "toxic": "target"}).labels[0, 0] == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"missing\.csv cannot be read: .*No such file"):
        read_csv(tmp_path / "missing.csv")


# --- Corrections ---


def test_a_review_says_only_what_its_reviewer_said() -> None:
    read = from_corrections([("bad", {"toxic": True, "insult": False, "threat": None}, 0.5)])
    np.testing.assert_array_equal(read.labels, [[1, UNKNOWN, UNKNOWN, UNKNOWN, 0, UNKNOWN]])
    assert read.weights.tolist() == [0.5]
    assert from_corrections([]).labels.shape == (0, 6)


# --- Duplicates ---


def merged(*rows: tuple[str, float, float]) -> tuple[Dataset, int]:
    """Of rows as (key, toxic, weight); and how many contradicted each other."""
    data = Dataset(
        [key for key, *_ in rows],
        np.array([[toxic] + [UNKNOWN] * 5 for _, toxic, _ in rows], dtype=np.float32).reshape(len(rows), 6),
        np.array([weight for *_, weight in rows], dtype=np.float32),
    )
    unique, first, contradictions = merge_duplicates(data, np.array(data.texts, dtype=object))
    assert [data.texts[index] for index in first] == unique.texts
    return unique, contradictions["toxic"]


@pytest.mark.parametrize(
    ("said", "counts_as", "contradictions"),
    [
        pytest.param([(1, 1), (1, 1)], 1, 0, id="the same"),
        pytest.param([(0.3, 1), (0.3, 1)], 0.3, 0, id="the same share"),
        pytest.param([(1, 1), (UNKNOWN, 1)], 1, 0, id="one does not say"),
        pytest.param([(UNKNOWN, 1), (UNKNOWN, 1)], UNKNOWN, 0, id="none says"),
        pytest.param([(1, 1), (0, 1), (0, 1)], 0, 1, id="majority"),
        pytest.param([(1, 1), (0, 1)], UNKNOWN, 1, id="tie"),
        pytest.param([(1, 0.6), (0, 0.3), (0, 0.3)], UNKNOWN, 1, id="tie of weights"),
        pytest.param([(1, 0.9), (0, 0.3), (0, 0.3)], 1, 1, id="majority of weights"),
    ],
)
def test_one_text_with_several_labels_counts_once(
    said: list[tuple[float, float]], counts_as: float, contradictions: int
) -> None:
    unique, found = merged(("other", 1, 1), *(("same", toxic, weight) for toxic, weight in said))
    assert unique.texts == ["other", "same"]
    np.testing.assert_array_equal(unique.labels[:, 0], np.array([1, counts_as], dtype=np.float32))
    assert found == contradictions
    assert unique.weights[1] == pytest.approx(np.mean([weight for _, weight in said]))


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([0.0, 1.0, UNKNOWN]), st.just(1.0)), max_size=30))
def test_merging_keeps_each_text_once_in_order_and_what_was_agreed(rows: list[tuple[str, float, float]]) -> None:
    unique, _ = merged(*rows)
    assert unique.texts == list(dict.fromkeys(key for key, *_ in rows))
    for key, toxic in zip(unique.texts, unique.labels[:, 0], strict=True):
        known = [said for other, said, _ in rows if other == key and not math.isnan(said)]
        ones = sum(known)
        expected = UNKNOWN if ones * 2 == len(known) else float(ones * 2 > len(known))
        np.testing.assert_equal(float(toxic), expected)


@pytest.mark.parametrize("variant", ["You  IDIOT", " you idiot\n", "ｙｏｕ ｉｄｉｏｔ", "𝐲𝐨𝐮 idiot"])
def test_case_spacing_and_look_alike_forms_make_no_other_text(variant: str) -> None:
    assert text_key(variant) == text_key("you idiot")


def test_the_same_letters_are_nearly_the_same_text() -> None:
    variants = ["You idiot!!!", "you, idiot...", "y o u  idiot 123", "you_idiot"]
    assert {near_key(text_key(text)) for text in variants} == {"youidiot"}
    # But texts without letters are not all one
    assert near_key(text_key("1488")) != near_key(text_key("!!!"))


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
        Dataset(data.texts, data.labels, np.array([1, 1, 2], dtype=np.float32)),
    ]
    assert len({other.sha256 for other in [data, *others]}) == 7
    # And the one that earlier releases gave, where no weights are
    assert read_csv(ROOT / "samples" / "holdout.csv").sha256.startswith("11e8452c")


def test_a_description_counts_what_is_known() -> None:
    described = concatenate([dataset("a", "b", toxic=1), dataset("c"), dataset("d", toxic=UNKNOWN)]).describe()
    assert described["rows"] == 4
    assert described["positives"] == dict.fromkeys(LABELS, 2)
    assert described["negatives"] == dict.fromkeys(LABELS, 1)
    assert described["unknown"] == dict.fromkeys(LABELS, 1)
    assert described["characters"]["longest"] == 1
