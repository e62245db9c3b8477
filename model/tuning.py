"""How large batches and windows should be on this device, found by measuring it for a few seconds.

What was measured is kept in a file: the next start on the same device, with a version of the same architecture, reads
it. Versions that differ in their weights only run alike, so a fine-tuned one is exchanged without measuring again.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as library_version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from model.batching import BatchCost, Batching, plan_batches
from model.engine import Engine, Scorer, default_batching
from model.version import ENCODER_FILE

logger = logging.getLogger(__name__)

LENGTH_QUANTILES = (
    5, 9, 11, 13, 14, 16, 18, 20, 22, 24, 27, 29, 32, 35, 37, 39, 41, 44, 46, 50,
    53, 55, 59, 63, 66, 71, 76, 82, 87, 94, 102, 112, 124, 138, 154, 175, 203, 241, 256, 256,
)  # fmt: skip
"""Token lengths of real comments, each for a fortieth of them: samples/comments.csv in windows of 256 tokens."""
MEASURED_LENGTHS = (24, 80, 256)
ROUNDS = 4
ENOUGH_S = 6.0
"""No larger batches are tried after this time."""
NEAR_BEST_BATCH, NEAR_BEST_WINDOW = 0.98, 0.985
"""Shares of the best speed: the smallest batch, and the smallest window, that reach them are taken."""
HOST_S_PER_BATCH = 0.0005
"""What a batch costs the process beside its forward pass."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A measured forward pass, with one of its like in every other lane: the fastest of some."""

    longest: int
    count: int
    seconds: float


def tuned(scorer: Scorer, directory: Path, *, max_batch_tokens: int = 0, window_tokens: int = 0) -> Scorer:
    """The scorer with the batching that suits this device: as set, as measured before, or as measured now.

    Args:
        directory: where measurements are kept. One that cannot be written to only means measuring again.
        max_batch_tokens: 0 where it is to be measured.
        window_tokens: likewise.
    """
    batching, how = default_batching(scorer.engine), "set"
    if not (max_batch_tokens and window_tokens):
        file = directory / f"{_key(scorer)}.json"
        kept = _read(file)
        if kept is None:
            started = time.perf_counter()
            batching = choose_batching(scorer.engine, measure(scorer))
            how = f"measured in {time.perf_counter() - started:.1f} s"
            _keep(file, batching)
        else:
            batching, how = kept, f"measured before, {file}"
    batching = replace(
        batching,
        max_batch_tokens=max_batch_tokens or batching.max_batch_tokens,
        window_tokens=window_tokens or batching.window_tokens,
    )
    logger.info(
        "batches of up to %d tokens from windows of %d (%s)", batching.max_batch_tokens, batching.window_tokens, how
    )
    return replace(scorer, batching=batching)


def measure(scorer: Scorer) -> list[Pass]:
    """Forward passes of several lengths and sizes, all lanes at once, until larger batches are no faster."""
    engine = scorer.engine
    ((ids,),) = scorer.encode(["you are right about the second half of the article"])
    lengths = sorted({min(length, scorer.manifest.max_length) for length in MEASURED_LENGTHS})
    shapes = [(length, 1) for length in lengths]
    fastest: dict[tuple[int, int], float] = {}
    with ThreadPoolExecutor(engine.lanes) as lanes:

        def run(longest: int, count: int) -> Pass:
            batch = [np.resize(ids, longest).tolist()] * count
            begun = time.perf_counter()
            list(lanes.map(engine.score, [batch] * engine.lanes))
            seconds = min(time.perf_counter() - begun, fastest.get((longest, count), math.inf))
            fastest[longest, count] = seconds
            return Pass(longest, count, seconds)

        started = time.perf_counter()
        best = 0.0
        batch_tokens = max(engine.max_batch_tokens // 4, lengths[-1])
        while time.perf_counter() - started < ENOUGH_S:
            of_this_size = [(length, batch_tokens // length) for length in lengths]
            try:
                # Twice, since the first pass of a shape may compile or allocate.
                speed = max(_tokens_per_s(run(*shape) for shape in of_this_size) for _ in range(2))
            except Exception as error:  # out of the device's memory, in each library's own words
                logger.info("batches of %d tokens do not fit this device (%s)", batch_tokens, type(error).__name__)
                break
            shapes += of_this_size
            if speed < best:
                break
            best = speed
            batch_tokens *= 2
        # Round by round, so that whatever else the machine does for a moment does not spoil all passes of one shape.
        for _ in range(ROUNDS):
            passes = [run(*shape) for shape in shapes]
    return passes


def choose_batching(engine: Engine, passes: Sequence[Pass]) -> Batching:
    """The smallest batch and window that are about as fast as any. Pure.

    Args:
        passes: of single windows, and of batches in ascending sizes, each with the same lengths.
    """
    sizes: dict[int, list[Pass]] = {}
    lengths = len({each.longest for each in passes})
    for index, each in enumerate(passes):
        sizes.setdefault(index // lengths, []).append(each)
    best = max(map(_tokens_per_s, sizes.values()))
    chosen = next(of_size for of_size in sizes.values() if _tokens_per_s(of_size) >= NEAR_BEST_BATCH * best)
    max_batch_tokens = max(each.longest * each.count for each in chosen)
    if not engine.pads:
        # Nothing is gained by looking at more than keeps every lane in work while the next window is prepared.
        return Batching(max_batch_tokens, 2 * engine.lanes * max_batch_tokens, None)
    cost = fit_cost([each for each in passes if each.longest * each.count <= max_batch_tokens])
    return Batching(max_batch_tokens, choose_window_tokens(cost, max_batch_tokens, engine.lanes), cost)


def fit_cost(passes: Sequence[Pass]) -> BatchCost:
    """Least squares of the relative error. Pure."""
    seconds = np.array([each.seconds for each in passes])
    terms = np.array([[1.0, each.count * each.longest, each.count * each.longest**2] for each in passes])
    (fixed_s, token_s, quadratic_s), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(passes)), rcond=None)
    if token_s <= 0:  # so small, or so disturbed, that nothing can be read from it
        return BatchCost()
    return BatchCost(
        fixed_tokens=float((max(fixed_s, 0.0) + HOST_S_PER_BATCH) / token_s),
        quadratic=float(max(quadratic_s, 0.0) / token_s),
    )


def choose_window_tokens(cost: BatchCost, max_batch_tokens: int, lanes: int) -> int:
    """The smallest window, doubling from one batch for every lane, from which plans are near the best. Pure."""
    lengths = np.random.default_rng(0).choice(LENGTH_QUANTILES, 4_000)
    most = int(lengths.sum())
    least_time = _planned_time(lengths, Batching(max_batch_tokens, most, cost))
    window_tokens = lanes * max_batch_tokens
    while window_tokens < most:
        if least_time >= NEAR_BEST_WINDOW * _planned_time(lengths, Batching(max_batch_tokens, window_tokens, cost)):
            break
        window_tokens *= 2
    return window_tokens


def _planned_time(lengths: NDArray[np.int64], batching: Batching) -> float:
    assert batching.cost is not None
    # Cut where the sum of lengths passes a multiple of the window.
    windows = np.flatnonzero(np.diff(np.cumsum(lengths) // batching.window_tokens)) + 1
    return sum(
        batching.cost.time(int(window[batch].max()), len(batch))
        for window in np.split(lengths, windows)
        for batch in plan_batches(window, batching)
    )


def _tokens_per_s(passes: Iterable[Pass]) -> float:
    passes = list(passes)
    return sum(each.longest * each.count for each in passes) / sum(each.seconds + HOST_S_PER_BATCH for each in passes)


def _key(scorer: Scorer) -> str:
    """The same for everything that runs alike."""
    facts = [
        scorer.manifest.files[ENCODER_FILE],
        scorer.manifest.max_length,
        scorer.engine.description,
        _cpu_model(),
        *map(_library_version, ("onnxruntime", "torch")),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _library_version(name: str) -> str:
    """Empty where it is not installed: either engine does without the other's."""
    try:
        return library_version(name)
    except PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _read(file: Path) -> Batching | None:
    try:
        return TypeAdapter(Batching).validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        logger.warning("%s cannot be read (%s); measuring again", file, type(error).__name__)
        return None


def _keep(file: Path, batching: Batching) -> None:
    temporary = file.with_suffix(f".{time.monotonic_ns()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(batching)), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        logger.info("the measurement cannot be kept in %s (%s); the next start measures again", file, error.strerror)
