"""The torch engine: fp32 on a CPU, the reference all others are held to; half precision without padding on CUDA."""

import json
import logging
import queue
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.engine import Scores
from model.network import ToxicityNetwork
from model.packed import PACKED_ATTENTION, PackedTexts
from model.version import ENCODER_FILE, WEIGHTS_FILE
from model.weights import load_weights

logger = logging.getLogger(__name__)

CUDA_LANES = 2
"""While the device runs one batch, the next is packed, copied and launched."""
CUDA_LENGTH_STEP = 16
"""Padded batches are rounded up to it, so that shapes, and with them kernels and memory blocks, recur."""
FP32_PACKING_ERROR = 1e-4
"""Most that packing may move a text's pooled vector in fp32, relative to its length; rounding stays far below."""
HALF_PACKING_ERROR = 0.05
"""The same for the kernel in bf16 or fp16, which is rougher by as much as that of padded attention."""
SHORT_TEXTS = (2, 9, 5)
LONG_TEXTS = (1, 130, 17, 64, 63, 65, 128, 3, 200, 31)
"""Lengths about the tiles in which kernels work."""


def load_network(directory: Path) -> ToxicityNetwork:
    """The network of a verified version, fp32, on the CPU, in evaluation mode."""
    network = ToxicityNetwork.from_config(json.loads((directory / ENCODER_FILE).read_text(encoding="utf-8")))
    network.load_state_dict(load_weights(directory / WEIGHTS_FILE), strict=True)
    return network.eval()


class TorchEngine:
    """Scores on a CPU or a CUDA device; see `model.engine.Engine`."""

    def __init__(self, directory: Path, device: str, threads: int) -> None:
        on_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
        self._network = load_network(directory)
        self._first_position: int | None = None
        if on_cuda:
            self._move_to_cuda()
        else:
            torch.set_num_threads(threads)
            self._device = torch.device("cpu")
            self.lanes, self.pads, self.max_batch_tokens = 1, True, 2_048
            self.description = f"torch fp32, {threads} CPU thread{'s' if threads > 1 else ''}"

    def _move_to_cuda(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        usual_attention = self._network.encoder.config._attn_implementation
        first = first_position(self._network)
        self._network.to(self._device)
        # The heads stay in fp32: they cost nothing, and a score is not rounded to three digits.
        self._network.encoder.to(torch.bfloat16 if has_bf16 else torch.float16)
        if first is not None and not kernel_agrees(self._network, first, usual_attention):
            first = None
        self._first_position = first
        self.lanes, self.pads, self.max_batch_tokens = CUDA_LANES, first is None, 32_768
        self.description = (
            f"torch {'bf16' if has_bf16 else 'fp16'} {'with' if self.pads else 'without'} padding, "
            f"{torch.cuda.get_device_name(self._device)}"
        )
        # Taken by the pass, not by the thread: the allocator keeps memory for every stream that was ever used.
        self._streams: queue.LifoQueue[torch.cuda.Stream] = queue.LifoQueue()
        for _ in range(CUDA_LANES):
            self._streams.put(torch.cuda.Stream(self._device))
        # The weights were moved on another stream than those that will read them.
        torch.cuda.synchronize(self._device)

    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        try:
            return self._score_on_cpu(token_ids) if self._device.type == "cpu" else self._score_on_cuda(token_ids)
        except torch.OutOfMemoryError as error:
            # The traceback holds what did fit, which whoever tries a half of the batch will need.
            raise error.with_traceback(None) from None

    @torch.inference_mode()
    def _score_on_cpu(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        scores: Scores = self._logits(token_ids).sigmoid().numpy()
        return scores

    @torch.inference_mode()
    def _score_on_cuda(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):
                scores = self._logits(token_ids).sigmoid()
                host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
                host.copy_(scores, non_blocking=True)
                # blocking: the thread sleeps, where it would keep a core busy with looking.
                copied = torch.cuda.Event(blocking=True)
                copied.record(stream)
            copied.synchronize()
        finally:
            self._streams.put(stream)
        result: Scores = host.numpy()
        return result

    def _logits(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        if self._first_position is None:
            pooled = self._network.pool(*padded_on(self._device, token_ids))
        else:
            pooled = self._network.pool_packed(PackedTexts.pack(token_ids, self._first_position, self._device))
        return self._network.classify(pooled)


def padded_on(device: torch.device, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Padded ids and their mask, both int64 (batch, length), on the device; not waited for on CUDA."""
    on_cuda = device.type == "cuda"
    lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
    longest = int(lengths.max())
    if on_cuda:
        longest += -longest % CUDA_LENGTH_STEP
    mask = np.arange(longest) < lengths[:, None]
    host = torch.zeros(2, *mask.shape, dtype=torch.int64, pin_memory=on_cuda)
    input_ids, attention_mask = host.numpy()
    input_ids[mask] = np.fromiter(chain.from_iterable(token_ids), np.int64, int(lengths.sum()))
    attention_mask[:] = mask
    there = host.to(device, non_blocking=True)
    return there[0], there[1]


@torch.inference_mode()
def first_position(network: ToxicityNetwork) -> int | None:
    """The position id of a text's first token in packed form, or None where the encoder cannot be read packed.

    Found by trying on a few short texts, in fp32 on the CPU, where nothing but rounding may differ. Where it is found
    the encoder is left with packed attention; else as it was.
    """
    encoder = network.encoder
    usual_attention = encoder.config._attn_implementation
    token_ids = _random_texts(network, SHORT_TEXTS)
    cpu = torch.device("cpu")
    found = []
    try:
        expected = network.pool(*padded_on(cpu, token_ids))
        encoder.set_attn_implementation(PACKED_ATTENTION)
        # RoBERTa and its kin count from behind the padding's id.
        for first in (0, _padding_id(network) + 1):
            difference = _difference(network.pool_packed(PackedTexts.pack(token_ids, first, cpu)), expected)
            if difference <= FP32_PACKING_ERROR:
                return first
            found.append(f"{difference:.2g}")
        why = f"pooled vectors differ by {' or '.join(found)}"
    except Exception as error:  # whatever an encoder of another kind makes of arguments it does not know
        why = f"{type(error).__name__}: {error}"
    encoder.set_attn_implementation(usual_attention)
    logger.warning("%s is run with padding: packed, %s", type(encoder).__name__, why)
    return None


@torch.inference_mode()
def kernel_agrees(network: ToxicityNetwork, first: int, usual_attention: str) -> bool:
    """Whether the device's variable-length attention gives what padded attention does there.

    Where it does the encoder is left with packed attention, else with the usual one.
    """
    encoder = network.encoder
    token_ids = _random_texts(network, LONG_TEXTS)
    device = next(encoder.parameters()).device
    try:
        encoder.set_attn_implementation(usual_attention)
        expected = network.pool(*padded_on(device, token_ids))
        encoder.set_attn_implementation(PACKED_ATTENTION)
        difference = _difference(network.pool_packed(PackedTexts.pack(token_ids, first, device)), expected)
        if difference <= HALF_PACKING_ERROR:
            return True
        why = f"pooled vectors differ by {difference:.2g}"
    except Exception as error:  # no such kernel for this card, head size or torch
        why = f"{type(error).__name__}: {error}"
    encoder.set_attn_implementation(usual_attention)
    logger.warning("%s is run with padding on %s: packed, %s", type(encoder).__name__, device, why)
    return False


def _difference(pooled: Tensor, expected: Tensor) -> float:
    """The largest distance of two vectors, relative to the expected one's length."""
    return float(((pooled - expected).norm(dim=1) / expected.norm(dim=1)).max())


def _random_texts(network: ToxicityNetwork, lengths: Sequence[int]) -> list[list[int]]:
    config = network.encoder.config
    padding = _padding_id(network)
    longest = getattr(config, "max_position_embeddings", 512) - padding - 1
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, config.vocab_size, min(length, longest)) for length in lengths]
    # A text holds no padding: encoders that look for it would take it for the end.
    return [np.where(ids == padding, (padding + 1) % config.vocab_size, ids).tolist() for ids in texts]


def _padding_id(network: ToxicityNetwork) -> int:
    return getattr(network.encoder.config, "pad_token_id", None) or 0
