"""Weights in safetensors: fp32, fp16, or int8 with one scale per row, always fp32 in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Precision = Literal["fp32", "fp16", "int8"]

SCALE_SUFFIX = ".int8_row_scale"


def save_weights(path: Path, state: Mapping[str, Tensor], precision: Precision) -> None:
    """Write a state dict; matrices in the given precision, vectors (norms, biases) as small as fp16 at least."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        values = tensor.detach().to("cpu", torch.float32)
        if precision == "int8" and values.dim() == 2:
            scale = values.abs().amax(dim=1).clamp(min=1e-12) / 127
            tensors[name] = (values / scale.unsqueeze(1)).round().to(torch.int8).contiguous()
            tensors[name + SCALE_SUFFIX] = scale
        elif precision == "fp16":
            tensors[name] = values.to(torch.float16).contiguous()
        else:
            tensors[name] = values.contiguous()
    save_file(tensors, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, as fp32."""
    stored = load_file(path)
    scales = {name.removesuffix(SCALE_SUFFIX): t for name, t in stored.items() if name.endswith(SCALE_SUFFIX)}
    return {
        name: tensor.to(torch.float32) * scales[name].unsqueeze(1) if name in scales else tensor.to(torch.float32)
        for name, tensor in stored.items()
        if not name.endswith(SCALE_SUFFIX)
    }
