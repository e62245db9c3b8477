"""What `bench.training` measures: each side in a process of its own, so that it has a peak of memory of its own.

The weights are random: speed does not depend on them.
"""

import argparse
import csv
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from config.names import LABELS
from config.settings import load_settings
from model.network import ToxicityNetwork
from model.onnx_engine import pad
from model.text import TextEncoder
from model.version import STARTER_DIRECTORY
from trainer.dataset import Dataset
from trainer.training import Progress, fine_tune, mixed_precision

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "samples" / "train.csv"
SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"model_type": "distilbert", "n_layers": 6, "dim": 768, "hidden_dim": 3072, "n_heads": 12},
    "minilm": {
        "model_type": "bert",
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 12,
    },
    "tiny": {"model_type": "distilbert", "n_layers": 2, "dim": 64, "hidden_dim": 128, "n_heads": 4},
}
SAID_EVERY_S = 10.0


def run(options: argparse.Namespace) -> None:
    """Measure both, one after the other, print them and write the figures."""
    if options.only:
        measured = _ours(options) if options.only == "ours" else _baseline(options)
        options.out.write_text(json.dumps(measured), encoding="utf-8")
        return
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": options.size,
    }
    for side in ("ours", "baseline"):
        with tempfile.TemporaryDirectory(prefix="moderato-bench-") as folder:
            result = Path(folder, "figures.json")
            command = [sys.executable, "-m", "bench.training", *sys.argv[1:], "--only", side, "--out", str(result)]
            subprocess.run(command, cwd=ROOT, check=True)
            figures[side] = json.loads(result.read_text(encoding="utf-8"))
    figures["speed_ratio"] = figures["ours"]["rows_per_s"] / figures["baseline"]["rows_per_s"]
    for side in ("ours", "baseline"):
        one = figures[side]
        print(
            f"{side:9} {one['rows_per_s']:9,.1f} rows/s  {one['seconds']:8,.1f} s for {one['rows_trained']:,} rows of "
            f"{one['mean_tokens']:.0f} tokens, batches of {one['batch_size']}, {one['precision']}, "
            f"peak {one['peak_memory_mib']:,.0f} MiB"
        )
    print(
        f"{figures['speed_ratio']:.2f} times the speed of transformers.Trainer's own settings, on {figures['device']}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(options.out)


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    settings = load_settings({}).trainer
    settings = settings.model_copy(
        update={"epochs": options.epochs, "batch_size": options.batch_size or settings.batch_size, "report_to": []}
    )
    rows = _rows(options.rows)
    text_encoder = TextEncoder(STARTER_DIRECTORY, settings.max_length)
    said_at = began = time.perf_counter()

    def report(progress: Progress) -> None:
        nonlocal said_at
        if time.perf_counter() - said_at >= SAID_EVERY_S:
            said_at = time.perf_counter()
            print(f"step {progress.step} of {progress.total_steps}, {progress.seconds_left:.0f} s left", flush=True)

    network = _network(options.size)
    with tempfile.TemporaryDirectory(prefix="moderato-bench-") as folder:
        # Checkpoints are written as by default: they are a part of what a training costs.
        fine_tune(network, text_encoder, rows, rows.take([]), settings, work_dir=Path(folder, "run"), report=report)
    seconds = time.perf_counter() - began
    precision = next((name for name, used in mixed_precision(settings.precision).items() if used), "fp32")
    return _figures(rows, text_encoder, math.ceil(len(rows) * options.epochs), settings.batch_size, precision, seconds)


def _baseline(options: argparse.Namespace) -> dict[str, Any]:
    """Rows in any order, each batch padded to its longest, fp32, and whatever else TrainingArguments begins with."""
    rows = _rows(options.baseline_rows)
    text_encoder = TextEncoder(STARTER_DIRECTORY, load_settings({}).trainer.max_length)
    network = _network(options.size)
    began = time.perf_counter()
    token_ids = text_encoder.encode_beginnings(rows.texts)
    with tempfile.TemporaryDirectory(prefix="moderato-bench-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=_WithLoss(network),
            args=arguments,
            train_dataset=[{"ids": ids, "labels": labels} for ids, labels in zip(token_ids, rows.labels, strict=True)],
            data_collator=_collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.perf_counter() - began
    return _figures(rows, text_encoder, len(rows), arguments.per_device_train_batch_size, "fp32", seconds)


class _WithLoss(nn.Module):
    """The network with the plain loss of what is known."""

    def __init__(self, network: ToxicityNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(input_ids, attention_mask)["logits"]
        known = ~labels.isnan()
        loss = binary_cross_entropy_with_logits(logits, labels.nan_to_num(), weight=known.float())
        return {"loss": loss, "logits": logits}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    input_ids, attention_mask = pad([row["ids"] for row in rows])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(np.stack([row["labels"] for row in rows])),
    }


def _network(size: str) -> ToxicityNetwork:
    vocabulary = json.loads((STARTER_DIRECTORY / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    torch.manual_seed(0)
    return ToxicityNetwork.from_config({**SIZES[size], "vocab_size": len(vocabulary), "max_position_embeddings": 512})


def _rows(count: int) -> Dataset:
    """Real comments with their labels, over and over until there are so many."""
    with TRAIN.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([[float(row[label] or "nan") for label in LABELS] for row in rows], dtype=np.float32)
    return Dataset([row["comment_text"] for row in rows], labels).take([index % len(rows) for index in range(count)])


def _figures(
    rows: Dataset, text_encoder: TextEncoder, trained: int, batch_size: int, precision: str, seconds: float
) -> dict[str, Any]:
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    sample = text_encoder.encode_beginnings(rows.texts[:10_000])
    return {
        "rows_per_s": trained / seconds,
        "seconds": seconds,
        "rows_trained": trained,
        "mean_tokens": sum(map(len, sample)) / len(sample),
        "batch_size": batch_size,
        "precision": precision,
        "peak_memory_mib": peak / 2**20,
    }
