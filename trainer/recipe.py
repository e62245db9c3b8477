"""From data to a written version: fine-tune, calibrate, export, prove, measure. Knows neither queue nor database."""

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoTokenizer

from config.drift import score_histogram
from config.settings import TrainerSettings, relative_to_root
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
from trainer.calibration import advised_thresholds, fit_calibration, to_logits
from trainer.curve import draw_curve
from trainer.dataset import Dataset
from trainer.evaluation import Evaluation, evaluate
from trainer.export import export_int8
from trainer.report import CARD_FILE, REPORT_FILE, write_report
from trainer.soundness import check_batching, check_int8, compare_int8
from trainer.training import Progress, Report, TrainingFailed, fine_tune, process_rank

logger = logging.getLogger(__name__)

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
    without_report: str | None
    """Why it has neither drawings nor a report; None where it has them."""


def from_version(directory: Path) -> StartingPoint:
    """Fine-tune further from a verified version."""
    manifest = read_manifest(directory)
    return StartingPoint(load_network(directory), directory, manifest.max_length, parent=manifest.version)


def from_encoder(settings: TrainerSettings, work_dir: Path) -> StartingPoint:
    """Start from the pretrained encoder of the settings. Its tokenizer and the known words are put into `work_dir`.

    Raises:
        TrainingFailed: the hub or the directory has no such encoder, no safetensors weights, or cannot be reached.
    """
    torch.manual_seed(settings.seed)  # of the heads, which begin at random
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it warns of each of its retries
    try:
        network = ToxicityNetwork.from_pretrained_encoder(settings.encoder)
        tokenizer = AutoTokenizer.from_pretrained(settings.encoder)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).strip().partition("\n")[0]
        raise TrainingFailed(
            f"the encoder {settings.encoder} cannot be loaded: {why} Name a directory that holds it, load it once "
            "with a network, or train a version further with --from"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    tokenizer.backend_tokenizer.save(str(work_dir / TOKENIZER_FILE))
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
    """Fine-tune, and write the result with its int8 form, its figures, its report and its probe scores to `directory`.

    The validation rows choose: the weights to keep, the calibration, the thresholds to advise. The held-out rows judge.
    Everything is measured on the weights as stored and in the form as shipped, not on what was in memory.

    Args:
        work_dir: of the checkpoints, from which `resume` goes on.

    Returns:
        None in all processes of a `torchrun` but the first, whose part ends with the training.

    Raises:
        TrainingFailed: the loss stopped being a number, or a setting does not fit this machine or these rows.
        CheckpointError: `work_dir` holds checkpoints of another run, or of this one and `resume` was not said.
        VersionError: `directory` exists; the int8 form is worse than its weights, or a text's score depends on its
            neighbours; or what was written does not load.
    """
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
    facts: dict[str, Any] = {
        "version": version,
        "parent": start.parent,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_length": start.max_length,
        "weights": precision,
        "probes": [],
        "dataset": data.card,
        "settings": relative_to_root(settings.model_dump(mode="json")),
        "metrics": {},
        "libraries": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
    }

    with writing_version(directory) as written:
        report(Progress("calibrating"))
        _write_encoder(start, written)
        _store(network, written, precision)  # before and after the fit, which is to the weights as they are stored
        facts |= _fit(network, written, facts, data.validation, settings)
        _store(network, written, precision)

        report(Progress("exporting"))
        text_encoder = TextEncoder(written, start.max_length)
        export_int8(network, _quantisation_texts(text_encoder, data.training, settings), written / ONNX_FILE)

        report(Progress("evaluating"))
        as_stored, as_shipped = _scorer(written, facts, "torch"), _scorer(written, facts, "onnx")
        evaluation = evaluate(as_shipped, holdout, robustness_rows=settings.robustness_rows)
        int8 = compare_int8(as_stored.score_texts(holdout.texts), evaluation.scores, holdout.labels)
        check_int8(int8, holdout.labels, settings)
        windows = text_encoder.encode(holdout.texts)
        for scorer in (as_stored, as_shipped):
            check_batching(scorer.engine, windows)
        facts |= {
            "probes": _probes(as_stored, as_shipped),
            "metrics": {
                "training_loss": trained.loss,
                "best_step": trained.best_step,
                "stopped_early": trained.stopped_early,
                "history": trained.history,
                "holdout_int8": evaluation.as_dict(),
                "score_histogram": score_histogram(evaluation.scores),
                "int8": int8,
            },
        }
        without_report = _try_to_report(written, facts, trained.history, evaluation)
        manifest = write_manifest(written, facts)
        load_scorer(written, device="cpu", engine="onnx")  # as a worker will: verified, probes scored
    return WrittenVersion(manifest, directory, evaluation, without_report)


def _try_to_report(
    written: Path, facts: Mapping[str, Any], history: Sequence[Mapping[str, float | None]], evaluation: Evaluation
) -> str | None:
    """Draw the training's course and write the report; why that failed, else None.

    A failure only costs the documents: the version has taken hours, and `moderato report` can write its page later.
    """
    try:
        draw_curve(history, written / CURVE_FILE)
        write_report(written, facts, scores=evaluation.scores, truth=evaluation.truth)
    except Exception as error:
        logger.warning("version %s is written without its report", facts["version"], exc_info=True)
        for file in (CURVE_FILE, REPORT_FILE, CARD_FILE):
            (written / file).unlink(missing_ok=True)
        return f"{type(error).__name__}: {error}"
    return None


def _write_encoder(start: StartingPoint, written: Path) -> None:
    """What the version shares with the one it starts from: how texts become tokens, and the encoder's shape."""
    for file in (TOKENIZER_FILE, WORDS_FILE):
        if (start.text_directory / file).is_file():
            shutil.copyfile(start.text_directory / file, written / file)
    config = start.network.encoder.config
    shape = json.dumps(config.to_diff_dict() | {"model_type": config.model_type}, indent=2, sort_keys=True)
    (written / ENCODER_FILE).write_text(shape, encoding="utf-8")


def _store(network: ToxicityNetwork, written: Path, precision: Precision) -> None:
    """Write the weights, and go on with them as they were rounded."""
    save_weights(written / WEIGHTS_FILE, network.state_dict(), precision)
    network.load_state_dict(load_weights(written / WEIGHTS_FILE))


def _fit(
    network: ToxicityNetwork, written: Path, facts: Mapping[str, Any], validation: Dataset, settings: TrainerSettings
) -> dict[str, Any]:
    """What the manifest says of calibration and thresholds; the calibration is folded into the network's heads."""
    if not len(validation):
        return {}
    logits = to_logits(_scorer(written, facts, "torch").score_texts(validation.texts))
    fitted = {}
    if settings.calibration == "temperature":
        calibration = fit_calibration(logits, validation.labels)
        calibration.fold_into(network)
        logits = calibration.apply(logits)
        fitted["calibration"] = calibration.as_dict()
    scores = 1 / (1 + np.exp(-logits))
    return fitted | {"thresholds": advised_thresholds(scores, validation.labels, settings.target_precision)}


def _scorer(written: Path, facts: Mapping[str, Any], form: Literal["torch", "onnx"]) -> Scorer:
    """Scores with what has been written so far."""
    manifest = write_manifest(written, facts)
    threads = torch.get_num_threads()
    engine = TorchEngine(written, "cpu", threads) if form == "torch" else OnnxEngine(written, threads)
    return Scorer(manifest, TextEncoder(written, manifest.max_length), engine, batching=default_batching(engine))


def _quantisation_texts(text_encoder: TextEncoder, training: Dataset, settings: TrainerSettings) -> list[list[int]]:
    """Tokens of the texts on which the int8 form's activation scales are fixed."""
    drawn = np.random.default_rng(settings.seed).permutation(len(training))[: settings.calibration_texts]
    return text_encoder.encode_beginnings([training.texts[int(index)] for index in drawn])


def _probes(as_stored: Scorer, as_shipped: Scorer) -> list[dict[str, Any]]:
    scored = zip(PROBE_TEXTS, as_stored.score_texts(PROBE_TEXTS), as_shipped.score_texts(PROBE_TEXTS), strict=True)
    return [
        {"text": text, "torch_scores": _floats(torch_row), "onnx_scores": _floats(onnx_row)}
        for text, torch_row, onnx_row in scored
    ]


def _floats(row: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in row]
