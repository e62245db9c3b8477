"""From data to a written version: fine-tune, export, measure, write. Knows neither queue nor database."""

import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from config.settings import TrainerSettings
from model.engine import Scorer, default_batching, load_scorer
from model.network import ToxicityNetwork
from model.onnx_engine import OnnxEngine
from model.text import KNOWN_WORDS, TOKENIZER_FILE, WORDS_FILE, TextEncoder
from model.torch_engine import TorchEngine, load_network
from model.version import (
    ENCODER_FILE,
    ONNX_FILE,
    WEIGHTS_FILE,
    Manifest,
    read_manifest,
    write_manifest,
    writing_version,
)
from model.weights import Precision, load_weights, save_weights
from trainer.assembly import TrainingData
from trainer.curve import draw_curve
from trainer.dataset import Dataset
from trainer.evaluation import Evaluation, measure
from trainer.export import export_int8
from trainer.training import Progress, Report, fine_tune, process_rank

CURVE_FILE = "training.png"
TENSORBOARD_FOLDER = ".tensorboard"
"""Beside the versions; `tensorboard --logdir` shows all of them."""
PROBE_TEXTS = (
    "Thank you for fixing the dates in the second paragraph.",
    "You are a complete idiot and nobody wants you here.",
    "ok",
)


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """What a training starts from: a version's directory, or a pretrained encoder with untrained heads."""

    network: ToxicityNetwork
    text_directory: Path
    """Holds the tokenizer, and the known words where disguised ones are read."""
    max_length: int
    parent: str | None


@dataclass(frozen=True, slots=True)
class WrittenVersion:
    """A version on disk, and what it scores on the held-out rows in the form that ships."""

    manifest: Manifest
    directory: Path
    evaluation: Evaluation


def from_version(directory: Path) -> StartingPoint:
    """Fine-tune further from a verified version."""
    manifest = read_manifest(directory)
    return StartingPoint(load_network(directory), directory, manifest.max_length, parent=manifest.version)


def from_encoder(settings: TrainerSettings, work_dir: Path) -> StartingPoint:
    """Start from the pretrained encoder of the settings. Its tokenizer and the known words are put into `work_dir`.

    Raises:
        OSError: the hub or the directory has no such encoder, or no safetensors weights.
    """
    torch.manual_seed(settings.seed)  # of the heads, which begin at random
    network = ToxicityNetwork.from_pretrained_encoder(settings.encoder)
    AutoTokenizer.from_pretrained(settings.encoder).backend_tokenizer.save(str(work_dir / TOKENIZER_FILE))
    shutil.copyfile(KNOWN_WORDS, work_dir / WORDS_FILE)
    return StartingPoint(network, work_dir, settings.max_length, parent=None)


def train_version(
    start: StartingPoint,
    data: TrainingData,
    holdout: Dataset,
    settings: TrainerSettings,
    *,
    version: str,
    directory: Path,
    work_dir: Path,
    report: Report,
    precision: Precision = "fp16",
    resume: bool = False,
) -> WrittenVersion | None:
    """Fine-tune, and write the result with its int8 form, its figures and its probe scores to `directory`.

    Everything is measured on the weights as stored and in the form as shipped, not on what was in memory.

    Args:
        work_dir: of the checkpoints, from which `resume` goes on.

    Returns:
        None in all processes of a `torchrun` but the first, whose part ends with the training.

    Raises:
        TrainingFailed: the loss stopped being a number, or a setting does not fit this machine or these rows.
        CheckpointError: `work_dir` holds checkpoints of another run, or of this one and `resume` was not said.
        VersionError: `directory` exists, or what was written does not load.
    """
    text_encoder = TextEncoder(start.text_directory, start.max_length)
    # Training may read less of each text than the version will in service: the time of a step grows with it.
    training_encoder = TextEncoder(start.text_directory, min(start.max_length, settings.max_length))
    network = start.network
    trained = fine_tune(
        network,
        training_encoder,
        data.training,
        data.validation,
        settings,
        work_dir=work_dir,
        report=report,
        resume=resume,
        tensorboard=directory.parent / TENSORBOARD_FOLDER / version,
    )
    if process_rank() > 0:
        return None
    network.to("cpu")

    with writing_version(directory) as written:
        report(Progress("exporting"))
        for file in (TOKENIZER_FILE, WORDS_FILE):
            if (start.text_directory / file).is_file():
                shutil.copyfile(start.text_directory / file, written / file)
        encoder_config = network.encoder.config.to_diff_dict() | {"model_type": network.encoder.config.model_type}
        (written / ENCODER_FILE).write_text(json.dumps(encoder_config, indent=2, sort_keys=True), encoding="utf-8")
        save_weights(written / WEIGHTS_FILE, network.state_dict(), precision)
        network.load_state_dict(load_weights(written / WEIGHTS_FILE))
        export_int8(network, _calibration(text_encoder, data.training, settings), written / ONNX_FILE)

        draw_curve(trained.history, written / CURVE_FILE)

        report(Progress("evaluating"))
        facts: dict[str, Any] = {
            "version": version,
            "parent": start.parent,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "max_length": start.max_length,
            "weights": precision,
            "probes": [],
            "dataset": data.card,
            "settings": json.loads(settings.model_dump_json()),
            "metrics": {},
            "libraries": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
        }
        unproven = write_manifest(written, facts)
        threads = torch.get_num_threads()
        torch_scores, onnx_scores = (
            Scorer(unproven, text_encoder, engine, batching=default_batching(engine)).score_texts(
                [*holdout.texts, *PROBE_TEXTS]
            )
            for engine in (TorchEngine(written, "cpu", threads), OnnxEngine(written, threads))
        )
        probes = [
            {"text": text, "torch_scores": _floats(torch_row), "onnx_scores": _floats(onnx_row)}
            for text, torch_row, onnx_row in zip(
                PROBE_TEXTS, torch_scores[len(holdout) :], onnx_scores[len(holdout) :], strict=True
            )
        ]
        shipped = measure(onnx_scores[: len(holdout)], holdout)
        reference = measure(torch_scores[: len(holdout)], holdout)
        metrics = {
            "training_loss": trained.loss,
            "best_step": trained.best_step,
            "stopped_early": trained.stopped_early,
            "history": trained.history,
            "holdout_int8": shipped.as_dict(),
            "holdout_fp32": reference.as_dict(),
            "int8_largest_difference": float(np.abs(onnx_scores - torch_scores).max()),
        }
        manifest = write_manifest(written, {**facts, "probes": probes, "metrics": metrics})
        load_scorer(written, device="cpu", engine="onnx")  # as a worker will: verified, probes scored
    return WrittenVersion(manifest, directory, shipped)


def _calibration(text_encoder: TextEncoder, training: Dataset, settings: TrainerSettings) -> list[list[int]]:
    drawn = np.random.default_rng(settings.seed).permutation(len(training))[: settings.calibration_texts]
    return text_encoder.encode_beginnings([training.texts[int(index)] for index in drawn])


def _floats(row: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in row]
