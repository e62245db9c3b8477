"""What turns comments into scores: a version's tokenizer and the engine that suits this machine."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from config.names import LABELS
from model.batching import plan_batches
from model.text import EncodedText, TextEncoder
from model.version import ONNX_FILE, Manifest, VersionError, verify

logger = logging.getLogger(__name__)

Scores = NDArray[np.float32]
"""Probabilities, (batch, 6), columns in the order of `config.names.LABELS`."""

ONNX_PROBE_TOLERANCE = 0.05
"""Integer kernels round differently from one CPU to the next; fixed scales keep that small."""
TORCH_PROBE_TOLERANCE = 0.02
"""bf16 on a GPU against the fp32 scores in the manifest."""


class Engine(Protocol):
    """Runs forward passes. Used by one thread at a time."""

    description: str
    """What runs on what, for people: `onnxruntime int8, 2 CPU threads`."""
    max_batch_tokens: int
    """Padded tokens in a batch beyond which larger ones are not faster here."""

    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        """One forward pass over texts of any lengths; a text's scores do not depend on its neighbours."""


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """A version ready to score: what prepared a text must also score it, so both travel together."""

    manifest: Manifest
    text_encoder: TextEncoder
    engine: Engine

    @property
    def version(self) -> str:
        return self.manifest.version

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        return self.text_encoder.encode(texts)

    def score_texts(self, texts: Sequence[str]) -> Scores:
        """Scores of any number of texts, in their order, batched by length."""
        encoded = self.encode(texts)
        scores = np.empty((len(texts), len(LABELS)), dtype=np.float32)
        for batch in plan_batches([len(item.ids) for item in encoded], self.engine.max_batch_tokens):
            scores[batch] = self.engine.score([encoded[index].ids for index in batch])
        return scores


def load_scorer(
    directory: Path,
    *,
    device: str = "auto",
    engine: str = "auto",
    threads: int = 0,
    expected_version: str | None = None,
) -> Scorer:
    """Verify a version, load it on the engine that suits this machine, and check it on its probe texts.

    Args:
        directory: of the version.
        device: auto, cpu or cuda.
        engine: auto, onnx or torch.
        threads: of a forward pass on a CPU; 0 takes every core.
        expected_version: refuse the directory if it holds another.

    Raises:
        VersionError: the version does not fit, cannot be loaded, or scores its probes otherwise than it should.
    """
    manifest = verify(directory, expected_version=expected_version)
    threads = threads or len(os.sched_getaffinity(0))
    on_onnx, why = _choose_onnx(device, engine, ONNX_FILE in manifest.files)
    try:
        text_encoder = TextEncoder(directory, manifest.max_length)
        loaded: Engine
        if on_onnx:
            from model.onnx_engine import OnnxEngine

            loaded = OnnxEngine(directory, threads)
        else:
            from model.torch_engine import TorchEngine  # imported here: a CPU worker needs no torch

            loaded = TorchEngine(directory, device, threads)
        scorer = Scorer(manifest, text_encoder, loaded)
        check_probes(scorer, on_onnx)
    except VersionError:
        raise
    except Exception as error:
        # Whatever a damaged or foreign file makes a library raise, the caller keeps its old version and goes on.
        raise VersionError(f"version {manifest.version} cannot be loaded: {type(error).__name__}: {error}") from error
    logger.info("version %s on %s (%s)", manifest.version, loaded.description, why)
    return scorer


def check_probes(scorer: Scorer, on_onnx: bool) -> None:
    """Score the manifest's probe texts and compare.

    Raises:
        VersionError: a score is not finite or not what the manifest expects.
    """
    probes = scorer.manifest.probes
    if not probes:
        return
    scores = scorer.score_texts([probe.text for probe in probes])
    if scores.shape != (len(probes), len(LABELS)) or not np.isfinite(scores).all():
        raise VersionError(f"version {scorer.version}: the probe texts' scores are not six finite numbers each")
    expected = np.array([probe.onnx_scores if on_onnx else probe.torch_scores for probe in probes], dtype=np.float32)
    tolerance = ONNX_PROBE_TOLERANCE if on_onnx else TORCH_PROBE_TOLERANCE
    difference = float(np.abs(scores - expected).max())
    if not difference <= tolerance:  # NaN, where the manifest lacks this engine's scores, is refused too
        raise VersionError(
            f"version {scorer.version}: a probe text's score is {difference:.3f} from the manifest's, "
            f"more than {tolerance}; these are not the weights it was published with"
        )


def _choose_onnx(device: str, engine: str, has_onnx: bool) -> tuple[bool, str]:
    """Whether ONNX Runtime is used, and why, in words."""
    if engine == "onnx":
        if device == "cuda":
            raise VersionError("engine onnx runs on a CPU; with device cuda set engine auto or torch")
        if not has_onnx:
            raise VersionError(f"engine onnx is asked for, but the version has no {ONNX_FILE}")
        return True, "engine: onnx is set"
    if engine == "torch":
        return False, "engine: torch is set"
    if device == "cuda":
        return False, "device: cuda is set"
    if device == "auto" and has_cuda():
        return False, "a CUDA device is there"
    if not has_onnx:
        return False, f"the version has no {ONNX_FILE}"
    return True, "no CUDA device: int8 is the fastest on a CPU" if device == "auto" else "device: cpu is set"


def has_cuda() -> bool:
    """Whether torch could use a CUDA device; torch itself is only loaded where a driver is installed."""
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    import torch

    return torch.cuda.is_available()
