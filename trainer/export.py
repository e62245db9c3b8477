"""The int8 form for CPUs: ONNX with static activation scales and per-channel weights.

Static, because dynamic quantisation takes one activation scale over the whole batch, and a comment's score would
depend on its neighbours.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from model.network import ToxicityNetwork
from model.onnx_engine import pad

OPSET = 17


class _Logits(nn.Module):
    def __init__(self, network: ToxicityNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network(input_ids, attention_mask)["logits"]


class _CalibrationTexts(CalibrationDataReader):
    """One text a step, unpadded: padding would widen the activation ranges with positions that never count."""

    def __init__(self, token_ids: Sequence[Sequence[int]]) -> None:
        self._inputs: Iterator[dict[str, np.ndarray]] = iter(
            [dict(zip(("input_ids", "attention_mask"), pad([ids]), strict=True)) for ids in token_ids]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def export_int8(network: ToxicityNetwork, calibration: Sequence[Sequence[int]], path: Path) -> None:
    """Write the network's int8 form.

    Args:
        network: fp32, on the CPU; left as it was.
        calibration: token ids of the texts on which the activation scales are fixed.
        path: of the ONNX file to write.
    """
    with tempfile.TemporaryDirectory(prefix="moderato-export-") as name, _quiet():
        exported, prepared = Path(name, "fp32.onnx"), Path(name, "prepared.onnx")
        _export_fp32(network, exported)
        quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _CalibrationTexts(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            # Seven bits: on CPUs without VNNI the integer kernels add pairs in 16 bits, which eight would
            # overflow, and the same comment would score otherwise on another machine.
            # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "MatMulConstBOnly": True,
                # What a layer adds to the residual stream has a few dimensions far larger than all others. One scale
                # over it would leave the rest no resolution: measured, most of the error of the whole export.
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gather"],
            },
        )
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])  # it loads, or the caller hears now


def _export_fp32(network: ToxicityNetwork, path: Path) -> None:
    # Two texts of different lengths, so that neither batch nor padding is taken for a constant.
    ids, mask = (torch.from_numpy(array) for array in pad([[1] * 16, [1] * 9]))
    axes = {0: "batch", 1: "length"}
    was_training = network.training
    attention = network.encoder.config._attn_implementation
    # The plain form of attention is the one that ONNX Runtime's optimiser recognises.
    network.eval().encoder.set_attn_implementation("eager")
    try:
        torch.onnx.export(
            _Logits(network),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    finally:
        network.encoder.set_attn_implementation(attention)
        network.train(was_training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing and quantising speak of their own affairs at length."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
