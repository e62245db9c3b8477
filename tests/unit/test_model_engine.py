"""The engines on one tiny version: they agree, and a comment's scores do not depend on its neighbours."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tiny import HOLDOUT, copy_version
from model.engine import Scorer, _choose_onnx, check_probes, load_scorer
from model.text import TextEncoder, window_starts
from model.version import ONNX_FILE, STARTER_DIRECTORY, VersionError, read_manifest, write_manifest
from trainer.dataset import read_csv

ALONE = 1e-5
"""How far a score may move with its neighbours: the rounding of sums taken in another order."""
INT8 = 0.05
"""How far int8 may be from fp32 on the tiny version."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """From one word to far more than the version reads."""
    return ["ok", *read_csv(HOLDOUT).texts[:40], "word " * 500]


@pytest.fixture(scope="module", params=["torch", "onnx"])
def scorer(request: pytest.FixtureRequest, tiny_version: Path) -> Scorer:
    return load_scorer(tiny_version, device="cpu", engine=request.param, threads=1)


def test_scores_are_six_probabilities_each(scorer: Scorer, texts: list[str]) -> None:
    scores = scorer.score_texts(texts)
    assert (scores.shape, scores.dtype) == ((42, 6), np.float32)
    assert ((scores > 0) & (scores < 1)).all()
    # And they tell texts apart, or the tests below would say nothing
    assert np.ptp(scores, axis=0).min() > 10 * ALONE


def test_a_batch_scores_as_each_of_its_texts_alone(scorer: Scorer, texts: list[str]) -> None:
    alone = np.concatenate([scorer.score_texts([text]) for text in texts])
    assert np.abs(scorer.score_texts(texts) - alone).max() < ALONE


def test_padding_does_not_matter(scorer: Scorer, texts: list[str]) -> None:
    # Given one batch of all of them, the shortest padded to the longest, where the scorer would have sorted
    ids = scorer.text_encoder.encode_beginnings(texts)
    assert max(map(len, ids)) == 64 > 20 * min(map(len, ids))
    alone = np.concatenate([scorer.engine.score([window]) for window in ids])
    assert np.abs(scorer.engine.score(ids) - alone).max() < ALONE


def test_the_order_does_not_matter(scorer: Scorer, texts: list[str]) -> None:
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = scorer.score_texts([texts[index] for index in order])
    assert np.abs(shuffled - scorer.score_texts(texts)[order]).max() < ALONE


def test_no_texts_have_no_scores(scorer: Scorer) -> None:
    assert scorer.score_texts([]).shape == (0, 6)


def test_int8_is_near_the_reference(tiny_version: Path, texts: list[str]) -> None:
    torch, onnx = (load_scorer(tiny_version, device="cpu", engine=name, threads=1) for name in ("torch", "onnx"))
    difference = np.abs(torch.score_texts(texts) - onnx.score_texts(texts)).max()
    assert 0 < difference < INT8


def test_a_scorer_says_what_runs_on_what(scorer: Scorer) -> None:
    assert scorer.version == "tiny-1"
    assert scorer.engine.description in ("torch fp32, 1 CPU thread", "onnxruntime int8, 1 CPU thread")


# --- Texts ---


def test_look_alike_letters_are_the_same_text(scorer: Scorer) -> None:
    plain, wide, circled = scorer.encode(["you idiot", "ｙｏｕ ｉｄｉｏｔ", "ⓨⓞⓤ ⓘⓓⓘⓞⓣ"])
    assert plain == wide == circled


def test_windows_are_located_in_the_text_as_it_is_read(scorer: Scorer) -> None:
    assert scorer.text_encoder.locate("you 1d1ot!") == ("you idiot!", [(0, 10)])
    # Given a text of several windows, each word of it known by its place
    words = [f"word{n}" for n in range(60)]
    read, spans = scorer.text_encoder.locate(" ".join(words))
    windows = scorer.encode([read])[0]
    assert len(windows) == len(spans) > 2
    # Then each window holds the tokens of its stretch, of which the whole ones are told apart
    for (start, end), ids in zip(spans, windows, strict=True):
        inner = scorer.encode([read[start:end].partition(" ")[2].rpartition(" ")[0]])[0][0][1:-1]
        assert str(inner)[1:-1] in str(ids)
    assert (spans[0][0], spans[-1][1]) == (0, len(read))


def test_a_text_longer_than_the_version_reads_becomes_several_windows() -> None:
    text = " ".join(f"word{n}" for n in range(300))
    (whole,) = TextEncoder(STARTER_DIRECTORY, 8_192).encode([text])[0]
    # Given a version that reads exactly as much
    assert TextEncoder(STARTER_DIRECTORY, len(whole)).encode([text]) == [[whole]]
    # And one that reads less
    windows = TextEncoder(STARTER_DIRECTORY, 200).encode([text])[0]
    # Then each window is half of what it reads, with the special tokens of its own
    assert all((len(ids), ids[0], ids[-1]) == (100, whole[0], whole[-1]) for ids in windows)
    # And together they are the text
    starts = window_starts(len(whole) - 2, 98)
    assert [ids[1:-1] for ids in windows] == [whole[1:-1][start : start + 98] for start in starts]


def test_training_reads_the_beginning_of_a_long_text() -> None:
    text = " ".join(f"word{n}" for n in range(300))
    (whole,) = TextEncoder(STARTER_DIRECTORY, 8_192).encode_beginnings([text])
    assert TextEncoder(STARTER_DIRECTORY, len(whole)).encode_beginnings([text]) == [whole]
    assert TextEncoder(STARTER_DIRECTORY, 200).encode_beginnings([text]) == [[*whole[:199], whole[-1]]]


@given(st.integers(1, 3_000), st.integers(1, 300))
def test_windows_cover_a_text_and_overlap_by_a_quarter(length: int, window: int) -> None:
    starts = window_starts(length, window)
    assert starts[0] == 0
    assert starts[-1] + window == max(length, window)
    for start, following in pairwise(starts):
        assert start < following <= start + window - window // 4


def test_what_is_said_at_the_end_of_a_long_text_counts(scorer: Scorer) -> None:
    # Given a text, and the same far behind others
    said = "you are a stupid idiot"
    text = "the article about trains " * 200 + said
    # Then the last of its windows ends in it
    windows = scorer.encode([text])[0]
    (alone,) = scorer.encode([said])[0]
    assert len(windows) > 3
    assert windows[-1][-len(alone) + 1 :] == alone[1:]
    # And the highest of each label's counts
    highest = np.max([scorer.engine.score([ids])[0] for ids in windows], axis=0)
    assert scorer.score_texts([text])[0] == pytest.approx(highest, abs=ALONE)


# --- Which engine ---


@pytest.mark.parametrize(
    ("device", "engine", "has_onnx", "cuda", "on_onnx"),
    [
        ("auto", "auto", True, False, True),
        ("auto", "auto", True, True, False),
        ("auto", "auto", False, False, False),
        ("cpu", "auto", True, True, True),
        ("cpu", "auto", False, True, False),
        ("cuda", "auto", True, True, False),
        ("cuda", "auto", True, False, False),
        ("auto", "torch", True, False, False),
        ("cpu", "torch", True, False, False),
        ("auto", "onnx", True, True, True),
        ("cpu", "onnx", True, False, True),
    ],
)
def test_the_engine_suits_the_machine(
    monkeypatch: pytest.MonkeyPatch, device: str, engine: str, has_onnx: bool, cuda: bool, on_onnx: bool
) -> None:
    monkeypatch.setattr("model.engine.has_cuda", lambda: cuda)
    chosen, why = _choose_onnx(device, engine, has_onnx)
    assert chosen is on_onnx
    assert why


def test_onnx_cannot_be_had_without_its_file() -> None:
    with pytest.raises(VersionError, match=r"engine onnx is asked for, but the version has no model\.int8\.onnx"):
        _choose_onnx("auto", "onnx", False)


def test_a_version_without_int8_form_runs_on_torch(tiny_version: Path, tmp_path: Path) -> None:
    copy = copy_version(tiny_version, tmp_path, "v1")
    (copy / ONNX_FILE).unlink()
    write_manifest(copy, read_manifest(copy).model_dump())
    assert load_scorer(copy, device="cpu", threads=1).engine.description == "torch fp32, 1 CPU thread"


# --- Probes ---


class OtherScores:
    """The engine, but for what it says."""

    def __init__(self, scorer: Scorer, value: float) -> None:
        self.description = scorer.engine.description
        self.lanes, self.pads = scorer.engine.lanes, scorer.engine.pads
        self.max_batch_tokens = scorer.engine.max_batch_tokens
        self._value = value

    def score(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        return np.full((len(token_ids), 6), self._value, dtype=np.float32)


@pytest.mark.parametrize(("value", "said"), [(0.99, "from the manifest's"), (np.nan, "not six finite numbers")])
def test_an_engine_that_miscalculates_is_found_out(scorer: Scorer, value: float, said: str) -> None:
    on_onnx = "onnx" in scorer.engine.description
    check_probes(scorer, on_onnx)
    with pytest.raises(VersionError, match=said):
        check_probes(replace(scorer, engine=OtherScores(scorer, value)), on_onnx)
