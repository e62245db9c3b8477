"""The network's loss and heads: what is not known must not teach."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from config.names import LABELS
from model.network import ToxicityNetwork, known_label_loss
from model.torch_engine import load_network

UNKNOWN = math.nan


@pytest.fixture
def network(tiny_version: Path) -> ToxicityNetwork:
    return load_network(tiny_version)


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask."""
    longest = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    return torch.arange(5, 5 + len(lengths) * longest).reshape(len(lengths), longest) * mask, mask


def head_gradients(network: ToxicityNetwork) -> list[float]:
    """The largest gradient of each label's head."""
    return [max(float(p.grad.abs().max()) for p in head.parameters() if p.grad is not None) for head in network.heads]


def test_an_unknown_label_teaches_its_head_nothing(network: ToxicityNetwork) -> None:
    # Given two texts of which nobody knows whether they are threats, and one whose insult is unknown
    ids, mask = batch(4, 3)
    labels = torch.tensor([[1, 0, 1, UNKNOWN, UNKNOWN, 0], [0, 0, 1, UNKNOWN, 1, 0]])
    # When the network learns from them
    network(ids, mask, labels)["loss"].backward()
    # Then the threat's head has no gradient at all, and every other one has
    gradients = dict(zip(LABELS, head_gradients(network), strict=True))
    assert gradients.pop("threat") == 0
    assert all(0 < gradient < math.inf for gradient in gradients.values())


def test_a_batch_of_which_nothing_is_known_changes_nothing(network: ToxicityNetwork) -> None:
    ids, mask = batch(4, 3)
    loss = network(ids, mask, torch.full((2, 6), UNKNOWN))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_the_loss_is_the_mean_over_what_is_known() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0, 5.0, -5.0]])
    labels = torch.tensor([[1, UNKNOWN, 0, UNKNOWN, 0.25, UNKNOWN]])
    known = [(0.3, 1), (2.0, 0), (5.0, 0.25)]
    by_hand = [-y * math.log(1 / (1 + math.exp(-x))) - (1 - y) * math.log(1 / (1 + math.exp(x))) for x, y in known]
    assert known_label_loss(logits, labels).item() == pytest.approx(sum(by_hand) / 3, rel=1e-5)


def test_padding_and_neighbours_do_not_change_a_logit(network: ToxicityNetwork) -> None:
    ids, mask = batch(3, 30)
    with torch.inference_mode():
        together = network(ids, mask)["logits"][0]
        alone = network(ids[:1, :3], mask[:1, :3])["logits"][0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_network_is_rebuilt_from_its_configuration(network: ToxicityNetwork, tiny_version: Path) -> None:
    rebuilt = ToxicityNetwork.from_config(json.loads((tiny_version / "encoder.json").read_text(encoding="utf-8")))
    assert {name: p.shape for name, p in rebuilt.state_dict().items()} == {
        name: p.shape for name, p in network.state_dict().items()
    }
    assert all(isinstance(head, nn.Linear) and head.out_features == 1 for head in rebuilt.heads)
    assert len(rebuilt.heads) == 6
