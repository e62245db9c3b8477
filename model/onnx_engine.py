"""The CPU's engine: static int8 on ONNX Runtime. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from model.engine import Scores
from model.version import ONNX_FILE


class OnnxEngine:
    """Scores on a CPU; see `model.engine.Engine`.

    Each core runs a forward pass of its own. One pass spread over all cores is done sooner, but its threads wait for
    each other in every layer, and each time the tokenizer or the database takes a core from one of them.
    """

    pads = True
    max_batch_tokens = 512

    def __init__(self, directory: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(directory / ONNX_FILE), options, providers=["CPUExecutionProvider"]
        )
        self.lanes = threads
        self.description = f"onnxruntime int8, {threads} CPU thread{'s' if threads > 1 else ''}"

    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        input_ids, attention_mask = pad(token_ids)
        (logits,) = self._session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
        return 1 / (1 + np.exp(-logits))


def pad(token_ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids padded to the longest with zeros, and the mask that hides the padding; both int64 (batch, longest)."""
    shape = (len(token_ids), max(map(len, token_ids)))
    input_ids = np.zeros(shape, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask
