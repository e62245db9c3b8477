"""Many texts in one row, for devices that need no padding: packing them, and attention that keeps them apart.

The encoder reads one sequence of all the batch's tokens. Position ids start anew with each text, and attention, the
only place where tokens meet, is told where each text ends. Encoders of transformers whose attention is exchangeable
(BERT, MiniLM, DistilBERT, RoBERTa, ELECTRA, ALBERT) can be read like this;
`model.torch_engine.first_position` finds out by trying.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED_ATTENTION = "moderato_packed"
"""Its name in transformers' attention interface. No mask is registered under it, so that none is ever built."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedTexts:
    """Several texts in one row."""

    ids: Tensor
    """Token ids, (1, tokens), int64."""
    positions: Tensor
    """Position ids that start anew with each text, (1, tokens), int64."""
    offsets: Tensor
    """Where each text starts and the last one ends, (texts + 1), int32."""
    longest: int
    """Tokens of the longest text."""

    @classmethod
    def pack(cls, token_ids: Sequence[Sequence[int]], first_position: int, device: torch.device) -> Self:
        """Put texts in a row on a device; one copy, which on CUDA the caller does not wait for.

        Args:
            token_ids: of each text, at least one text and one token in each.
            first_position: the position id of a text's first token.
            device: where the encoder is.
        """
        lengths = np.fromiter(map(len, token_ids), np.int32, len(token_ids))
        tokens = int(lengths.sum())
        # Only from pinned memory does CUDA copy while the caller goes on; torch keeps it until the copy is done.
        host = torch.empty(2 * tokens + len(lengths) + 1, dtype=torch.int32, pin_memory=device.type == "cuda")
        numbers: NDArray[np.int32] = host.numpy()
        ids, positions, offsets = numbers[:tokens], numbers[tokens : 2 * tokens], numbers[2 * tokens :]
        ids[:] = np.fromiter(chain.from_iterable(token_ids), np.int32, tokens)
        offsets[0] = 0
        np.cumsum(lengths, out=offsets[1:])
        positions[:] = np.arange(first_position, first_position + tokens, dtype=np.int32)
        positions -= np.repeat(offsets[:-1], lengths)
        there = host.to(device, non_blocking=True)
        both = there[: 2 * tokens].long().view(2, 1, tokens)
        return cls(both[0], both[1], there[2 * tokens :], int(lengths.max()))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed text: Flash Attention on CUDA, text by text elsewhere.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head size), as `key` and `value`.
        attention_mask: must be None.
        scaling: of the products; None means 1 / √(head size).
        cu_seq_lens_q: the texts' offsets.
        max_length_q: tokens of the longest text.

    Returns:
        (1, tokens, heads, head size), and no weights.

    Raises:
        ValueError: the encoder wants what packed attention does not do.
    """
    unknown = [name for name in ("sliding_window", "softcap", "position_bias", "s_aux") if others.get(name) is not None]
    if attention_mask is not None or unknown or getattr(module, "is_causal", False) or query.shape != key.shape:
        raise ValueError(f"{type(module).__name__} needs more than plain bidirectional attention ({unknown})")
    # (tokens, heads, head size): the layers' own order in memory, so this copies nothing.
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    usual = query.shape[-1] ** -0.5
    if scaling is not None and scaling != usual:
        query = query * (scaling / usual)
    if query.is_cuda:
        # Imported here: it takes seconds, and a torch before 2.10 has none.
        from torch.nn.attention.varlen import varlen_attn

        output: Any = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    else:
        lengths = cu_seq_lens_q.diff().tolist()
        texts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        output = torch.cat([nn.functional.scaled_dot_product_attention(*text) for text in texts], dim=1).transpose(0, 1)
    return output.unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
