"""The network: one shared encoder, dropout, and six heads of one logit each."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from config.names import LABELS
from model.packed import PackedTexts

DROPOUT = 0.1


class ToxicityNetwork(nn.Module):
    """Any Hugging Face encoder with a `Linear(hidden, 1)` head per label of `config.names.LABELS`.

    The heads read the mean of the last hidden states over the real tokens, which every encoder has, whatever
    its special tokens.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(DROPOUT)
        self.heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, 1) for _ in LABELS)

    @classmethod
    def from_pretrained_encoder(cls, name_or_path: str | Path) -> "ToxicityNetwork":
        """An untrained classifier on a pretrained encoder: a hub name or a directory with safetensors weights."""
        # use_safetensors: a pickled checkpoint can run code when it is read.
        return cls(AutoModel.from_pretrained(str(name_or_path), dtype=torch.float32, use_safetensors=True))

    @classmethod
    def from_config(cls, encoder_config: dict[str, Any]) -> "ToxicityNetwork":
        """A network of this architecture with random weights, to load a state dict into."""
        settings = dict(encoder_config)
        model_type = settings.pop("model_type")
        return cls(AutoModel.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """`logits`, (batch, 6).

        Args:
            input_ids: token ids, (batch, length).
            attention_mask: 1 for real tokens, 0 for padding, (batch, length).
        """
        return {"logits": self.classify(self.pool(input_ids, attention_mask))}

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of each text's last hidden states, fp32 (batch, hidden); arguments as of `forward`."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def pool_packed(self, texts: PackedTexts) -> Tensor:
        """What `pool` gives, fp32 (texts, hidden); the encoder's attention must be `model.packed.PACKED_ATTENTION`."""
        hidden = self.encoder(
            input_ids=texts.ids,
            position_ids=texts.positions,
            cu_seq_lens_q=texts.offsets,
            max_length_q=texts.longest,
        ).last_hidden_state.squeeze(0)
        # unsafe: its checks would wait for the device.
        return torch.segment_reduce(hidden.float(), "mean", offsets=texts.offsets, axis=0, unsafe=True)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits (batch, 6) of pooled texts."""
        pooled = self.dropout(pooled)
        return torch.cat([head(pooled) for head in self.heads], dim=1)
