"""The benchmark with real servers and a real worker, at a size that proves nothing but that it runs."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.context import Context, read_texts
from bench.measure import Line
from bench.sections import several_workers
from bench.system import INSTANT_BATCHES, BenchProblem, Servers, System, celery_process, servers


@pytest.fixture(scope="module")
def running() -> Iterator[Servers]:
    with servers() as running:
        yield running


class SmallContext(Context):
    def count(self, thorough: int, quick: int) -> int:
        return 40 if quick > 40 else quick


def test_a_section_measures_real_workers(running: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several_workers, "WORKERS", (1, 2))
    # Given real comments and real servers, when a section is measured
    steps: list[str] = []
    lines = several_workers.measure(SmallContext(read_texts()[:50], running, True, steps.append))
    # Then each figure is one of comments that have their rows, which the drain makes sure of
    assert [line.what for line in lines] == ["1 worker", "2 workers", "2 workers ÷ 1"]
    assert all(sample > 0 for line in lines for sample in line.samples)
    assert all(isinstance(line, Line) and line.section == "workers" for line in lines)
    assert steps


def test_the_time_of_the_commit_tells_the_latency(running: Servers) -> None:
    with System(running, "PostgreSQL", app="bench.instant", settings=INSTANT_BATCHES) as system:
        # Given a comment that was submitted ten seconds ago
        system.push(system.envelopes.message([[{"text": "hello"}]], submitted_at=time.time() - 10))
        # When it is decided
        system.wait_until_empty()
        # Then it took that long and a little more
        (latency_ms,) = system.latencies_ms()
        assert 10_000 < latency_ms < 70_000
        # And the worker's stages are told apart
        assert {"score", "record"} & set(system.workers[0].thread_cpu_s())


def test_a_process_that_ends_is_named_and_nothing_is_left(running: Servers, tmp_path: Path) -> None:
    with pytest.raises(BenchProblem, match=r"worker\.log ended with status"):
        celery_process("bench.no_such_app", "toxicity", "w", tmp_path / "worker.log")
    assert not [child for child in psutil.Process(os.getpid()).children() if "no_such_app" in " ".join(child.cmdline())]
