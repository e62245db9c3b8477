"""Fine-tuning on a tiny version: it learns, says how far it is, repeats itself, and stops when the loss is lost."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.tiny import TRAIN, tiny_settings
from model.network import ToxicityNetwork
from model.text import TextEncoder
from model.torch_engine import load_network
from trainer.dataset import Dataset, read_csv
from trainer.training import FineTuned, Progress, Report, TrainingFailed, fine_tune

ROWS = 20
FineTune = Callable[..., FineTuned]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return read_csv(TRAIN).take(range(ROWS))


@pytest.fixture
def network(tiny_version: Path) -> ToxicityNetwork:
    return load_network(tiny_version)


@pytest.fixture
def train(tiny_version: Path, tmp_path: Path) -> FineTune:
    """Fine-tune with the tiny version's tokenizer."""

    def fine_tuned(
        network: ToxicityNetwork,
        data: Dataset,
        report: Report = lambda progress: None,
        *,
        validation: Dataset | None = None,
        resume: bool = False,
        **overrides: object,
    ) -> FineTuned:
        settings = tiny_settings(**{"batch_size": 8, "checkpoint_steps": 0} | overrides)
        return fine_tune(
            network,
            TextEncoder(tiny_version, 64),
            data,
            validation or data.take([]),
            settings,
            work_dir=tmp_path / "checkpoints",
            report=report,
            resume=resume,
        )

    return fine_tuned


def weights(network: ToxicityNetwork) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in network.parameters()])


def test_progress_counts_every_step(network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
    # When 20 rows are trained on twice, eight at a time
    heard: list[Progress] = []
    mean_loss = train(network, data, heard.append, epochs=2).loss
    # Then each of the six steps is reported
    assert [progress.step for progress in heard] == [1, 2, 3, 4, 5, 6]
    assert {(progress.phase, progress.total_steps) for progress in heard} == {("training", 6)}
    assert all(progress.seconds_left is not None and progress.seconds_left >= 0 for progress in heard)
    assert heard[-1].seconds_left == 0
    losses = [progress.loss for progress in heard if progress.loss is not None]
    assert mean_loss == pytest.approx(sum(losses) / 6, rel=0.01)


def test_training_lowers_the_loss(network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
    heard: list[Progress] = []
    train(network, data, heard.append, epochs=10, learning_rate=1e-2)
    first, last = ([progress.loss for progress in part] for part in (heard[:3], heard[-3:]))
    assert sum(filter(None, last)) < 0.7 * sum(filter(None, first))


def test_the_same_seed_gives_the_same_weights(network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
    # Given three copies of a network
    before = weights(network)
    trained = []
    for seed in (1, 1, 2):
        twin = copy.deepcopy(network)
        train(twin, data, seed=seed)
        trained.append(weights(twin))
    # Then the same seed leads to the same weights, and another one to others
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], before)


def test_a_trained_network_computes_in_fp32_again(network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
    # Given a trained network, and its weights in one that was never trained, in mixed precision or otherwise
    train(network, data)
    untouched = ToxicityNetwork.from_config(network.encoder.config.to_dict())
    untouched.load_state_dict(network.state_dict())
    # Then both compute the same to the last bit
    ids = torch.arange(5, 45).reshape(4, 10)
    with torch.inference_mode():
        ours, theirs = (each(ids, torch.ones_like(ids))["logits"] for each in (network, untouched.eval()))
    assert torch.equal(ours, theirs)


def test_a_loss_that_is_no_number_ends_the_run(network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
    # Given a head whose answers are no numbers
    for weight in network.heads[0].parameters():
        weight.data.fill_(math.nan)
    with pytest.raises(TrainingFailed, match=r"the loss is nan at step 1 of 3; a lower learning rate"):
        train(network, data)


def test_weights_that_explode_end_the_run_at_their_step(
    network: ToxicityNetwork, data: Dataset, train: FineTune
) -> None:
    # Given weights at the edge of what a number can hold, which the first step takes beyond it
    for head in network.heads.parameters():
        head.data.fill_(1e38)
    heard: list[Progress] = []
    with pytest.raises(TrainingFailed, match=r"at step (\d+) of 60; a lower learning rate than 1 "):
        train(network, data, heard.append, epochs=20, learning_rate=1.0)
    # Then what was reported before it are numbers
    assert all(progress.loss is not None and np.isfinite(progress.loss) for progress in heard)


def test_what_a_report_raises_ends_the_run(network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
    steps: list[int | None] = []

    def give_up(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(network, data, give_up, epochs=10)
    assert steps == [1, 2]


def test_labels_that_nobody_knows_are_trained_on_without_harm(
    network: ToxicityNetwork, data: Dataset, train: FineTune
) -> None:
    unknown = replace(data, labels=np.full((ROWS, 6), np.nan, dtype=np.float32))
    assert train(network, unknown).loss == 0
    assert weights(network).isfinite().all()
