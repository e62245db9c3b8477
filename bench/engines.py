"""The engine by itself, and engines that take no time. The one place in bench/ that knows how a version is loaded,
how texts become token ids and how batches are cut; the rivals use it too, so it imports neither Celery nor torch.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from config.names import LABELS
from config.settings import ROOT
from model.batching import plan_batches
from model.engine import Scorer, default_batching, load_scorer
from model.onnx_engine import pad
from model.text import TextEncoder
from model.version import ONNX_FILE, STARTER_DIRECTORY, read_manifest

Ids = Sequence[int]
ScoreTexts = Callable[[Sequence[str]], Any]
"""Texts to scores, (texts, 6)."""

CORES = len(os.sched_getaffinity(0))


# --- Ours, without anything around it --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """The best plan that a search found: how the whole corpus is cut into forward passes."""

    max_batch_tokens: int
    by_cost: bool
    """By `plan_batches`, rather than wherever the sorted texts fill the budget."""

    def __str__(self) -> str:
        return f"up to {self.max_batch_tokens:,} tokens, cut {'by cost' if self.by_cost else 'where full'}"


class EngineAlone:
    """The engine that a worker on this machine would choose, given token ids by the same process."""

    def __init__(self) -> None:
        from model.tuning import tuned

        self.scorer = tuned(load_scorer(STARTER_DIRECTORY), ROOT / "var" / "batching")
        self._lanes = ThreadPoolExecutor(self.scorer.engine.lanes)

    @property
    def description(self) -> str:
        return self.scorer.engine.description

    def close(self) -> None:
        self._lanes.shutdown()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The windows of all texts, one after the other."""
        return [ids for windows in self.scorer.encode(texts) for ids in windows]

    def seconds(self, windows: Sequence[Ids], plan: Plan) -> float:
        """Time of the forward passes over a corpus cut by this plan, as many side by side as the engine takes."""
        batches = [[windows[index] for index in batch] for batch in self._cut(windows, plan)]
        batches.sort(key=lambda batch: -len(batch) * len(batch[-1]))  # the largest first, so that lanes end together
        started = time.perf_counter()
        for _ in self._lanes.map(self.scorer.engine.score, batches):
            pass
        return time.perf_counter() - started

    def one_pass_ms(self, text: str) -> float:
        """Time of the forward passes of one text alone."""
        windows = self.encode([text])
        started = time.perf_counter()
        self.scorer.engine.score(windows)
        return (time.perf_counter() - started) * 1000

    def best_plan(self, windows: Sequence[Ids], budgets: Sequence[int]) -> Plan:
        """The fastest of these budgets, and of two ways to cut."""
        plans = [Plan(budget, by_cost) for budget in budgets for by_cost in (True, False)]
        return min(plans, key=lambda plan: self.seconds(windows, plan))

    def _cut(self, windows: Sequence[Ids], plan: Plan) -> list[list[int]]:
        lengths = [len(ids) for ids in windows]
        if not plan.by_cost:
            return cut_where_full(lengths, plan.max_batch_tokens)
        whole = replace(self.scorer.batching, max_batch_tokens=plan.max_batch_tokens, window_tokens=sum(lengths))
        return plan_batches(lengths, whole)


def cut_where_full(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indexes by length, shortest first, a new batch wherever longest × count would pass the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or lengths[index] * (len(batches[-1]) + 1) > max_batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


# --- What takes no time ----------------------------------------------------------------------------------------------


class InstantTextEncoder:
    """Token counts as a tokenizer would find them, give or take, without reading the text."""

    def encode(self, texts: Sequence[str]) -> list[list[Ids]]:
        return [[_IDS[min(len(text) // 5 + 2, len(_IDS) - 1)]] for text in texts]

    encode_readable = encode


_IDS = [[1] * length for length in range(257)]


class InstantEngine:
    """Six constant scores. Batches as large as a GPU's: there the host is what limits."""

    description = "instant"
    lanes = 1
    pads = False
    max_batch_tokens = 32_768

    def __init__(self) -> None:
        self._scores = np.full((65_536, len(LABELS)), 0.01, dtype=np.float32)

    def score(self, token_ids: Sequence[Ids]) -> Any:
        return self._scores[: len(token_ids)]


def load_instant_scorer(directory: Path, **_: object) -> Scorer:
    """Stands in for `model.engine.load_scorer` in bench/instant.py."""
    engine: Any = InstantEngine()
    encoder: Any = InstantTextEncoder()
    return Scorer(read_manifest(directory), encoder, engine, batching=default_batching(engine))


# --- For the rivals --------------------------------------------------------------------------------------------------


@cache
def starter_tokenizer() -> TextEncoder:
    return TextEncoder(STARTER_DIRECTORY, read_manifest(STARTER_DIRECTORY).max_length)


def load_int8(threads: int, *, sort: bool = False) -> ScoreTexts:
    """The same weights and kernels as ours, for one process: text in, scores out, padded as it comes.

    Args:
        threads: of a forward pass.
        sort: cut a batch of many into several of like lengths, up to 1,024 padded tokens each.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(STARTER_DIRECTORY / ONNX_FILE), options, providers=["CPUExecutionProvider"]
    )

    def score(token_ids: Sequence[Ids]) -> Any:
        input_ids, attention_mask = pad(token_ids)
        (logits,) = session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
        return 1 / (1 + np.exp(-logits))

    return _scoring(score, sort)


def load_fp32(threads: int) -> ScoreTexts:
    """The same weights in torch."""
    from model.torch_engine import TorchEngine

    return _scoring(TorchEngine(STARTER_DIRECTORY, "cpu", threads).score, sort=False)


def _scoring(score: Callable[[Sequence[Ids]], Any], sort: bool) -> ScoreTexts:
    encoder = starter_tokenizer()

    def score_texts(texts: Sequence[str]) -> Any:
        # All windows of a long text, as ours: the same answers for the same work.
        encoded = encoder.encode(texts)
        ids = [window for windows in encoded for window in windows]
        text_of_window = np.repeat(np.arange(len(texts)), [len(windows) for windows in encoded])
        batches = cut_where_full(list(map(len, ids)), 1024) if sort else [list(range(len(ids)))]
        scores = np.zeros((len(texts), len(LABELS)), dtype=np.float32)
        for batch in batches:
            np.maximum.at(scores, text_of_window[batch], score([ids[index] for index in batch]))
        return scores

    return score_texts
