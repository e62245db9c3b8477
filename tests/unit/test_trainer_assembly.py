"""What a run trains on: leaks, duplicates, corrections, the validation rows, and the card that tells of them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS
from config.settings import ROOT, load_settings
from trainer.assembly import TrainingData, assemble, choose_validation
from trainer.dataset import Dataset, near_key, read_csv, text_key

UNKNOWN = math.nan


def dataset(*texts: str, toxic: float = 0.0) -> Dataset:
    return Dataset(list(texts), np.full((len(texts), 6), toxic, dtype=np.float32))


NOTHING = dataset()


def assembled(
    folder: Path, rows: Dataset, corrections: Dataset = NOTHING, holdout: Dataset = NOTHING, **settings: object
) -> TrainingData:
    """From a file of these rows; nothing kept apart and nothing added, but for what `settings` say."""
    frame = pd.DataFrame(rows.labels, columns=list(LABELS)).assign(comment_text=rows.texts)
    frame.to_csv(folder / "rows.csv", index=False)
    plain: dict[str, Any] = {
        "train_files": [str(folder / "rows.csv")] if len(rows) else [],
        "correction_repeats": 3,
        "validation_share": 0,
        "evasion_share": 0,
        "synonym_share": 0,
    }
    return assemble(load_settings({}).trainer.model_copy(update=plain | settings), corrections, holdout)


@pytest.mark.parametrize("variant", ["You  IDIOT", " you idiot\n", "ｙｏｕ ｉｄｉｏｔ", "𝐲𝐨𝐮 idiot", "you, idiot!"])
def test_a_text_that_is_held_out_is_not_trained_on(tmp_path: Path, variant: str) -> None:
    # Given a held-out text that occurs in another spelling among the replayed rows and the corrections
    data = assembled(tmp_path, dataset("hello", variant), dataset(variant, "thanks", toxic=1), dataset("you idiot"))
    # Then the gate will not judge what was learnt by heart
    assert data.training.texts == ["hello", "thanks", "thanks", "thanks"]
    assert data.card["leaks_dropped"] == data.card["corrections"]["leaks_dropped"] == 1


@pytest.mark.parametrize("variant", ["you idiot", "You  IDIOT", "ｙｏｕ ｉｄｉｏｔ"])
def test_a_correction_replaces_the_row_it_corrects(tmp_path: Path, variant: str) -> None:
    data = assembled(tmp_path, dataset("hello", variant, toxic=0), dataset("you idiot", toxic=1))
    assert data.training.texts == ["hello", "you idiot", "you idiot", "you idiot"]
    assert data.training.labels[:, 0].tolist() == [0, 1, 1, 1]
    assert data.card["corrections"]["replaced"] == 1


def test_duplicates_count_once_and_rows_without_a_label_not_at_all(tmp_path: Path) -> None:
    rows = Dataset(
        ["a", "A ", "b", "c", "c"],
        np.array([[1] * 6, [UNKNOWN] + [1] * 5, [UNKNOWN] * 6, [1] * 6, [0] + [1] * 5], dtype=np.float32),
    )
    data = assembled(tmp_path, rows)
    assert sorted(data.training.texts) == ["a", "c"]
    contradictions = dict.fromkeys(LABELS, 0) | {"toxic": 1}
    assert data.card | {"duplicates_merged": 2, "unlabelled_dropped": 1, "contradictions": contradictions} == data.card


def test_rows_are_drawn_by_the_seed_and_corrections_are_all_kept(tmp_path: Path) -> None:
    rows, corrections = dataset(*(f"row {'x' * n}" for n in range(100))), dataset("a", "b")
    first, again, other = (
        assembled(tmp_path, rows, corrections, max_rows=10, seed=seed).training for seed in (1, 1, 2)
    )
    assert len(first) == 10 + 3 * 2
    assert first.sha256 == again.sha256
    assert set(first.texts[:10]) != set(other.texts[:10])
    assert len(assembled(tmp_path, rows).training) == 100


def test_there_may_be_corrections_only(tmp_path: Path) -> None:
    assert assembled(tmp_path, NOTHING, dataset("a")).training.texts == ["a"] * 3
    nothing = assembled(tmp_path, NOTHING)
    assert len(nothing.training) == 0
    assert "No row is left" in nothing.card["notes"][0]


def test_the_sample_files_give_the_same_rows_in_every_process(tmp_path: Path) -> None:
    # Given a run on the shipped samples, with everything added that can be
    program = (
        "from config.settings import load_settings; from trainer.assembly import assemble; "
        "from trainer.dataset import from_corrections; from trainer.sources import read_holdout; "
        "settings = load_settings({}).trainer.model_copy(update={'oversample_share': 0.1, 'synonym_share': 0.1});"
        "print(assemble(settings, from_corrections([]), read_holdout(settings)).card['sha256'])"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PATH": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    # Then it does not hang on how this process orders its sets
    assert len(hashes) == 1


# --- The validation rows ---


def test_no_text_is_on_both_sides_and_only_training_is_added_to(tmp_path: Path) -> None:
    # Given texts of which some differ in punctuation only, and corrections nearly the same as some of them
    rows = dataset(*(f"text {'x' * (n // 2)}{'!' * (n % 2)}" for n in range(400)), toxic=1)
    corrections = dataset(*(f"text, {'x' * n}" for n in range(20)))
    data = assembled(
        tmp_path, rows, corrections, dataset("nothing of it"), validation_share=0.2, evasion_share=1.0, max_rows=300
    )
    # Then each group of like texts is on one side, copies and corrections on the training side
    keys = [{near_key(text_key(text)) for text in part.texts} for part in (data.training, data.validation)]
    assert not keys[0] & keys[1]
    assert not set(data.validation.texts) - set(rows.texts)
    assert 50 <= len(data.validation) <= 90
    assert data.card["added"]["evasive"] > 250
    assert data.card["training"]["sha256"] == data.training.sha256
    assert "too few" in data.card["notes"][0]
    assert json.loads(json.dumps(data.card)) == data.card


def test_a_copy_that_comes_to_be_spelt_like_a_held_out_text_is_left_out(tmp_path: Path) -> None:
    # Given texts whose letters are the held-out one's where others are written as digits: 570p 17
    rows = dataset(*("stop it" + "!" * n for n in range(20)))
    data = assembled(tmp_path, rows, NOTHING, dataset("p"), evasion_share=10)
    assert 100 < data.card["added"]["evasive"] < 200
    assert "p" not in {near_key(text_key(text)) for text in data.training.texts}


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.02, 0.05, 0.3]))
def test_every_label_has_its_share_of_positives_in_validation(seed: int, share: float) -> None:
    # Given 1,000 rows with labels as rare as 6 in 1,000, half of them with one label known alone
    labels = np.zeros((1000, 6), dtype=np.float32)
    labels[500:, 1:] = UNKNOWN
    for label, positives in enumerate((100, 30, 60, 6, 50, 10)):
        labels[:positives, label] = 1
    keys = np.array([f"row{n}" for n in range(1000)], dtype=object)
    chosen = choose_validation(labels, keys, set(), share=share, rng=np.random.default_rng(seed))
    assert abs(chosen.sum() - share * 1000) <= 6
    if share:
        assert (np.nansum(labels[chosen], axis=0) >= 1).all()
        assert (np.nansum(labels[~chosen], axis=0) >= 1).all()


@pytest.mark.parametrize("size", [1, 3, 20])
def test_texts_that_resemble_each_other_do_not_multiply_what_is_kept_apart(size: int) -> None:
    # Given 2,000 rows in groups of texts with the same letters, and one group that alone is a tenth of them
    keys = np.array([f"group{n // size}" for n in range(1_800)] + ["campaign"] * 200, dtype=object)
    labels = np.zeros((2_000, 6), dtype=np.float32)
    labels[:1_000, 0] = 1
    chosen = choose_validation(labels, keys, set(), share=0.05, rng=np.random.default_rng(1))
    # Then whole groups are drawn until the share is reached
    assert 100 - size <= chosen.sum() <= 100 + size
    assert not set(keys[chosen]) & set(keys[~chosen])
    assert 0 < labels[chosen, 0].sum() < chosen.sum()


def test_the_shipped_samples_hold_each_other_s_texts_hardly_anywhere(tmp_path: Path) -> None:
    settings = load_settings({}).trainer
    card = assemble(settings, NOTHING, read_csv(settings.holdout_file)).card
    assert card["leaks_dropped"] <= 1
    assert card["sources"][0]["rows"] == 3000
