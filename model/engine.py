"""What turns comments into scores: a version's tokenizer and the engine that suits this machine."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from config.names import LABELS
from model.batching import BatchCost, Batching, plan_batches
from model.text import TextEncoder, Windows
from model.version import ONNX_FILE, Manifest, VersionError, verify

logger = logging.getLogger(__name__)

Scores = NDArray[np.float32]
"""Probabilities, (batch, 6), columns in the order of `config.names.LABELS`."""

ONNX_PROBE_TOLERANCE = 0.05
"""Integer kernels round differently from one CPU to the next; fixed scales keep that small."""
TORCH_PROBE_TOLERANCE = 0.04
"""bf16 on a GPU against the fp32 scores in the manifest."""


DEFAULT_WINDOW_BATCHES = 32


class Engine(Protocol):
    """Runs forward passes, `lanes` of them side by side."""

    description: str
    """What runs on what, for people: `onnxruntime int8, 2 CPU threads`."""
    lanes: int
    """Threads that may be in `score` at once, and must be for the device to be busy."""
    pads: bool
    """Whether a batch costs longest × count; if not, it costs the sum of its lengths."""
    max_batch_tokens: int
    """A batch size that is good on most devices of this kind, where nothing was measured."""

    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        """One forward pass over windows of any lengths; a window's scores do not depend on its neighbours."""


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """A version ready to score: what prepared a text must also score it, so both travel together."""

    manifest: Manifest
    text_encoder: TextEncoder
    engine: Engine
    batching: Batching = field(kw_only=True)

    @property
    def version(self) -> str:
        return self.manifest.version

    def encode(self, texts: Sequence[str]) -> list[Windows]:
        return self.text_encoder.encode(texts)

    def encode_readable(self, texts: Sequence[str]) -> list[Windows]:
        return self.text_encoder.encode_readable(texts)

    def score_texts(self, texts: Sequence[str]) -> Scores:
        """Scores of any number of texts, in their order; of a long text's windows each label's highest."""
        encoded = self.encode(texts)
        text_of_window = np.repeat(np.arange(len(texts)), [len(windows) for windows in encoded])
        token_ids = [ids for windows in encoded for ids in windows]
        batches = plan_batches([len(ids) for ids in token_ids], self.batching)
        scores = np.zeros((len(texts), len(LABELS)), dtype=np.float32)
        with ThreadPoolExecutor(self.engine.lanes) as lanes:
            scored = lanes.map(lambda batch: self.engine.score([token_ids[index] for index in batch]), batches)
            for batch, batch_scores in zip(batches, scored, strict=True):
                np.maximum.at(scores, text_of_window[batch], batch_scores)
        return scores


def default_batching(engine: Engine) -> Batching:
    """How work is cut for an engine that was not measured."""
    return Batching(
        max_batch_tokens=engine.max_batch_tokens,
        window_tokens=DEFAULT_WINDOW_BATCHES * engine.max_batch_tokens,
        cost=BatchCost() if engine.pads else None,
    )


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
        scorer = Scorer(manifest, text_encoder, loaded, batching=default_batching(loaded))
        check_probes(scorer, on_onnx)
    except VersionError:
        raise
    except Exception as error:
        # Whatever a damaged or foreign file makes a library raise, the caller keeps its old version and goes on.
        raise VersionError(f"version {manifest.version} cannot be loaded: {type(error).__name__}: {error}") from error
    logger.info("version %s on %s (%s)", manifest.version, loaded.description, why)
    return scorer


def check_probes(scorer: Scorer, on_onnx: bool) -> None:
    """Score the manifest's probe texts and compare; of a version without any, see that it scores at all.

    Raises:
        VersionError: a score is not finite or not what the manifest expects.
    """
    probes = scorer.manifest.probes
    texts = [probe.text for probe in probes] or ["ok"]
    scores = scorer.score_texts(texts)
    if scores.shape != (len(texts), len(LABELS)) or not np.isfinite(scores).all():
        raise VersionError(f"version {scorer.version}: the probe texts' scores are not six finite numbers each")
    if not probes:
        return
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
