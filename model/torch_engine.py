"""The torch engine: fp32 on a CPU, the reference all others are held to; bf16 on CUDA."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from model.engine import Scores
from model.network import ToxicityNetwork
from model.onnx_engine import pad
from model.version import ENCODER_FILE, WEIGHTS_FILE
from model.weights import load_weights


def load_network(directory: Path) -> ToxicityNetwork:
    """The network of a verified version, fp32, on the CPU, in evaluation mode."""
    network = ToxicityNetwork.from_config(json.loads((directory / ENCODER_FILE).read_text(encoding="utf-8")))
    network.load_state_dict(load_weights(directory / WEIGHTS_FILE), strict=True)
    return network.eval()


class TorchEngine:
    """Scores on a CPU or a CUDA device; see `model.engine.Engine`."""

    def __init__(self, directory: Path, device: str, threads: int) -> None:
        on_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
        self._device = torch.device("cuda" if on_cuda else "cpu")
        self._dtype = torch.bfloat16 if on_cuda else torch.float32
        self._network = load_network(directory).to(self._device, self._dtype)
        self.max_batch_tokens = 32_768 if on_cuda else 2_048
        if on_cuda:
            self.description = f"torch bf16, {torch.cuda.get_device_name(self._device)}"
        else:
            torch.set_num_threads(threads)
            self.description = f"torch fp32, {threads} CPU thread{'s' if threads > 1 else ''}"

    @torch.inference_mode()
    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        input_ids, attention_mask = (torch.from_numpy(array).to(self._device) for array in pad(token_ids))
        logits = self._network(input_ids, attention_mask)["logits"]
        scores: Scores = logits.float().sigmoid().cpu().numpy()
        return scores
