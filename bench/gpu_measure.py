"""What `bench.gpu` measures: a DistilBERT-size version on one device, by itself and as a worker's engine.

The encoder's weights are random: speed does not depend on them. Floating-point operations are counted from real tokens,
so that padding is waste and not work.
"""

import csv
import gzip
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from sqlalchemy import make_url

from api_client.embedded import EmbeddedRedis
from bench.measure import Line, at_least
from bench.report import Report, new_report, table
from bench.system import Servers, System, distinct_texts, servers
from cli.terminal import out, say
from config.settings import ROOT
from db import queries
from db.session import writing
from model.batching import Batching, plan_batches
from model.engine import Engine, Scores, default_batching, load_scorer
from model.network import ToxicityNetwork
from model.text import TOKENIZER_FILE
from model.torch_engine import load_network, padded_on
from model.version import (
    ENCODER_FILE,
    STARTER_DIRECTORY,
    WEIGHTS_FILE,
    read_manifest,
    write_manifest,
    writing_version,
)
from model.weights import save_weights

VERSION = "gpu-bench"
STREAM = ROOT / "samples" / "stream.csv.gz"
MAX_LENGTH = 256
LIST_SIZE = 64
NAIVE_BATCH = 32
DISTILBERT = {"n_layers": 6, "dim": 768, "hidden_dim": 3072, "n_heads": 12}
TINY = {"n_layers": 2, "dim": 64, "hidden_dim": 128, "n_heads": 4}
BUDGETS = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
QUICK_BUDGETS = (512, 2_048)
MATRIX_SIZES = (4_096, 8_192, 16_384)
QUICK_MATRIX_SIZES = (256, 512)
ENGINE_AIM = at_least(0.40)
SYSTEM_AIM = at_least(15_000)
Ids = Sequence[int]
Score = Callable[[Sequence[Ids]], Scores]


def run(device: str, *, quick: bool, only: str | None, result: Path) -> int:
    """Measure and print; write the figures where they are a GPU's and thorough.

    Returns:
        The exit status.
    """
    if device == "cuda" and not torch.cuda.is_available():
        say("there is no CUDA device; `--device cpu --quick` tries all of it on the CPU, at sizes that say nothing")
        return 1
    started = time.monotonic()
    report = new_report(shlex.join([Path(sys.executable).name, "-m", "bench.gpu", *sys.argv[1:]]), quick=quick)
    report.versions["transformers"] = transformers.__version__
    report.machine |= card(device)
    with tempfile.TemporaryDirectory(prefix="moderato-gpu-", dir="/tmp") as folder:
        directory = write_version(Path(folder) / VERSION, TINY if quick else DISTILBERT)
        if only != "system":
            _add(report, "engine", "The engine alone, on real comments", measure_engine(directory, device, quick))
        if only != "engine":
            title = "Redis to committed rows, lists of 64, one worker process"
            _add(report, "system", title, measure_system(directory, device, quick))
    report.seconds = time.monotonic() - started
    if device == "cpu" or quick:
        say(f"nothing is written: these are figures of {device}{', at tiny sizes' if quick else ''}, not of a GPU")
    else:
        report.write(result)
        say(f"{result}, after {report.seconds / 60:.0f} minutes")
    return 0


def card(device: str) -> dict[str, Any]:
    """The device in words, for whoever wants the same figures again."""
    if device == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "device": properties.name,
        "device_memory_gib": round(properties.total_memory / 2**30),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def _add(report: Report, section: str, title: str, lines: list[Line]) -> None:
    report.sections[section] = title
    report.lines += lines
    out.print(table(f"{title} ({report.machine['device']})", lines))


# --- What is measured ------------------------------------------------------------------------------------------------


def write_version(directory: Path, sizes: dict[str, int]) -> Path:
    """A version as the trainer writes one, but for its random weights, and without an int8 form."""
    tokenizer = json.loads((STARTER_DIRECTORY / TOKENIZER_FILE).read_text(encoding="utf-8"))
    vocabulary = len(tokenizer["model"]["vocab"])
    config = {"model_type": "distilbert", "vocab_size": vocabulary, "max_position_embeddings": 512, **sizes}
    torch.manual_seed(0)
    with writing_version(directory) as written:
        shutil.copyfile(STARTER_DIRECTORY / TOKENIZER_FILE, written / TOKENIZER_FILE)
        (written / ENCODER_FILE).write_text(json.dumps(config), encoding="utf-8")
        save_weights(written / WEIGHTS_FILE, ToxicityNetwork.from_config(config).state_dict(), "fp16")
        facts: dict[str, Any] = {
            "version": directory.name,
            "parent": None,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "max_length": MAX_LENGTH,
            "weights": "fp16",
        }
        write_manifest(written, facts | {"probes": [], "dataset": {}, "settings": {}, "metrics": {}, "libraries": {}})
    return directory


def read_texts() -> list[str]:
    with gzip.open(STREAM, "rt", encoding="utf-8", newline="") as file:
        return [row["comment_text"] for row in csv.DictReader(file)]


def operations(lengths: Sequence[int], sizes: dict[str, int]) -> int:
    """Floating-point operations of the encoder's matrix products over texts of these lengths, without padding."""
    width = sizes["dim"]
    per_token = 2 * (4 * width**2 + 2 * width * sizes["hidden_dim"])
    attention = 4 * width  # of a token with each token of its text: the product with its key, and with its value
    return sizes["n_layers"] * sum(length * (per_token + attention * length) for length in lengths)


# --- The engine alone ------------------------------------------------------------------------------------------------


def measure_engine(directory: Path, device: str, quick: bool) -> list[Line]:
    """Three ways to score the same texts, each at its best budget, beside a plain matrix product on the same device."""
    sizes = TINY if quick else DISTILBERT
    rounds = 2 if quick else 3
    scorer = load_scorer(directory, device=device, engine="torch")
    texts = read_texts()[: 60 if quick else None]
    windows = [ids for text in scorer.encode(texts) for ids in text]
    # Long enough to measure, and more than any budget searched.
    windows *= 1 if quick else 8
    lengths = [len(ids) for ids in windows]
    comments = len(texts) * (1 if quick else 8)
    matrix_rate = max(matrix_operations_per_s(size, device) for size in (QUICK_MATRIX_SIZES if quick else MATRIX_SIZES))
    plain = PlainPadding(directory, device)
    budgets = QUICK_BUDGETS if quick else BUDGETS
    arrival = [
        list(range(start, min(start + NAIVE_BATCH, len(windows)))) for start in range(0, len(windows), NAIVE_BATCH)
    ]
    ways: list[tuple[str, Score, int, Callable[[int], list[list[int]]], Sequence[int]]] = [
        ("naive: batches of 32 as they come, padded", plain.score, 1, lambda _: arrival, (NAIVE_BATCH,)),
        ("sorted and padded", plain.score, 1, lambda budget: cut_sorted(lengths, budget), budgets),
        (
            f"shipped: {scorer.engine.description}",
            scorer.engine.score,
            scorer.engine.lanes,
            lambda budget: plan_batches(lengths, shipped_batching(scorer.engine, budget)),
            budgets,
        ),
    ]
    best = {}
    for name, score, lanes, cut, tried in ways:
        best[name] = min(tried, key=lambda budget: seconds(score, windows, cut(budget), lanes))
        say(f"{name}: best of {len(tried)} budgets is {best[name]:,}")
    spent: dict[str, list[float]] = {name: [] for name, *_ in ways}
    for _ in range(rounds):
        for name, score, lanes, cut, _ in ways:
            spent[name].append(seconds(score, windows, cut(best[name]), lanes))
    lines = [
        Line(
            "engine",
            "a plain matrix product",
            (matrix_rate / 1e12,),
            "TFLOP/s",
            note="best of some sizes",
            charted=False,
        )
    ]
    for name, measured in spent.items():
        note = "" if name.startswith("naive") else f"{best[name]:,} tokens a batch"
        shipped = name.startswith("shipped")
        fractions = tuple(operations(lengths, sizes) / each / matrix_rate for each in measured)
        lines += [
            Line("engine", name, fractions, "of that", ENGINE_AIM if shipped else None, note),
            Line("engine", name, tuple(comments / each for each in measured), "comments/s", charted=False),
            Line("engine", name, tuple(sum(lengths) / each for each in measured), "tokens/s", charted=False),
        ]
    return lines


def cut_sorted(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Shortest first, a new batch wherever longest × count would pass the budget."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and lengths[index] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def shipped_batching(engine: Engine, budget: int) -> Batching:
    return Batching(max_batch_tokens=budget, window_tokens=budget, cost=default_batching(engine).cost)


def seconds(score: Score, windows: Sequence[Ids], batches: Sequence[Sequence[int]], lanes: int) -> float:
    """Wall-clock time from token ids in Python lists to scores in numpy, after a batch that is not counted."""
    filled = [[windows[index] for index in batch] for batch in batches]
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(score, filled[-lanes:]))
        started = time.perf_counter()
        for _ in pool.map(score, filled):
            pass
        return time.perf_counter() - started


class PlainPadding:
    """What one writes first: pad, copy, forward, sigmoid, wait; in the device's half precision."""

    def __init__(self, directory: Path, device: str) -> None:
        self._device = torch.device(device)
        self._network = load_network(directory).to(self._device)
        if device == "cuda":
            self._network.encoder.to(torch.bfloat16)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[Ids]) -> Scores:
        pooled = self._network.pool(*padded_on(self._device, token_ids))
        scores: Scores = self._network.classify(pooled).sigmoid().cpu().numpy()
        return scores


@torch.inference_mode()
def matrix_operations_per_s(size: int, device: str) -> float:
    """Of the product of two square matrices of random numbers, in bf16 on CUDA: the median of twenty after three."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    product = torch.empty_like(left)
    times = []
    for _ in range(23):
        if device == "cuda":
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            torch.mm(left, right, out=product)
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended) / 1000)
        else:
            started = time.perf_counter()
            torch.mm(left, right, out=product)
            times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[3:])


# --- With Redis and a database ---------------------------------------------------------------------------------------


def measure_system(directory: Path, device: str, quick: bool) -> list[Line]:
    """A preloaded queue of lists to committed rows, no two texts alike, on SQLite and PostgreSQL."""
    count = 640 if quick else 131_072
    rounds = 1 if quick else 3
    texts = distinct_texts(read_texts(), count)
    settings = {
        "MODERATO_WORKER__DEVICE": device,
        "MODERATO_WORKER__ENGINE": "torch",
        # Where the wheels are, for the worker too.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    lines = []
    with running_servers() as (running, kinds):
        for kind in kinds:
            with System(running, kind, settings=settings) as system:
                activate(system, directory)
                system.rate(texts[: count // 16], LIST_SIZE)  # the first batches pay for allocations
                rates = []
                for _ in range(rounds):
                    drained = system.drain(system.envelopes.comments(texts, LIST_SIZE), count)
                    rates.append(count / drained.seconds)
                note = f"{drained.cpu_s / count * 1e6:.0f} µs of the worker's CPU a comment"
                lines.append(Line("system", kind, tuple(rates), "comments/s", SYSTEM_AIM, note))
    return lines


def activate(system: System, directory: Path) -> None:
    """Have the worker load the version and go on with it."""
    shutil.copytree(directory, system.versions_dir / VERSION)
    with writing(system.engine) as connection:
        queries.register_version(connection, read_manifest(directory).model_dump(), datetime.now(UTC))
    system.activate(VERSION)
    worker = system.workers[0]
    worker.wait_for(lambda: f"version {VERSION} replaces" in worker.said(), f"the exchange of {VERSION}")


@contextmanager
def running_servers() -> Iterator[tuple[Servers, tuple[str, ...]]]:
    """Redis with PostgreSQL, and the databases to measure; SQLite alone where PostgreSQL does not start here."""
    with ExitStack() as stack:
        try:
            running = stack.enter_context(servers())
        except Exception as error:  # its wheel left out, or no user to run it as
            say(f"PostgreSQL is left out: {type(error).__name__}: {error}")
        else:
            yield running, ("SQLite", "PostgreSQL")
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moderato-bench-", dir="/tmp")))
        redis = EmbeddedRedis(folder / "redis", data=folder / "redis" / "data", log=folder / "redis.log")
        yield Servers(stack.enter_context(redis), make_url("postgresql://"), folder), ("SQLite",)
