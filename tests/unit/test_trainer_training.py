"""Fine-tuning on a tiny version: it learns, says how far it is, repeats itself, and stops when the loss is lost.

A kill is played by an exception here; a real one is in tests/integration/test_training_runs.py.
"""

import copy
import json
import math
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import safe_globals

from bench.tiny import TRAIN, tiny_settings
from model.network import ToxicityNetwork
from model.onnx_engine import pad
from model.text import TextEncoder
from model.torch_engine import load_network
from trainer.checkpoints import CheckpointError, checkpoint_folder, last_checkpoint, mark_complete
from trainer.dataset import Dataset, read_csv
from trainer.evaluation import measure
from trainer.recipe import from_encoder
from trainer.training import FineTuned, Progress, Report, TrainingFailed, fine_tune, parameter_groups

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


def still(network: ToxicityNetwork) -> ToxicityNetwork:
    """A copy without dropout, whose training depends on its batches alone."""
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return twin


def killed_at(step: int) -> Report:
    """A report that ends a training as a kill would, at a step."""

    def report(progress: Progress) -> None:
        if progress.step == step:
            raise InterruptedError

    return report


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


def test_an_encoder_that_cannot_be_loaded_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingFailed, match=str(tmp_path)) as failed:
        from_encoder(tiny_settings(encoder=str(tmp_path)), tmp_path)
    assert "\n" not in str(failed.value)
    assert capfd.readouterr().err == ""


class TestSteps:
    def test_batches_that_are_added_up_make_the_step_of_a_larger_batch(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune
    ) -> None:
        # Given rows of which much is unknown, some of more weight, and gradients so short that their length counts
        labels = np.where(np.random.default_rng(1).random(data.labels.shape) < 0.5, np.nan, data.labels)
        rows = replace(data, labels=labels, weights=np.linspace(0.5, 2, ROWS, dtype=np.float32))
        how: dict[str, Any] = {"precision": "fp32", "max_grad_norm": 0.01, "positive_weights": "sqrt", "epochs": 2}
        # When one copy of a network learns from eight at a time, and another from four and four
        large, small = still(network), still(network)
        train(large, rows, **how)
        train(small, rows, batch_size=4, gradient_accumulation=2, **how)
        # Then both come to the same, but for the order in which numbers were added
        moved = (weights(large) - weights(network)).abs().max()
        assert (weights(large) - weights(small)).abs().max() < 0.01 * moved

    def test_activations_that_are_computed_twice_change_nothing(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune
    ) -> None:
        plain, sparing = still(network), still(network)
        train(plain, data, precision="fp32")
        train(sparing, data, precision="fp32", gradient_checkpointing=True)
        assert torch.allclose(weights(plain), weights(sparing), atol=1e-6)
        assert not sparing.encoder.is_activation_checkpointing

    @pytest.mark.parametrize(("schedule", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("cosine", 0.853)])
    def test_the_rate_rises_and_falls(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune, schedule: str, halfway: float
    ) -> None:
        # When ten per cent of 20 steps are warm-up
        trained = train(network, data, epochs=20 / 3, warmup_ratio=0.1, learning_rate=1e-3, lr_schedule=schedule)
        rates = [point["learning_rate"] for point in trained.history]
        # Then the peak is reached after them, and nearly nothing is left at the end
        assert rates[0] == 0 and rates[2] == max(filter(None, rates)) == 1e-3
        assert rates[-1] is not None and rates[-1] < 1e-4
        # And between them it falls as its name says: half of it is left halfway, and of a cosine most after a quarter
        assert rates[11 if halfway == 0.5 else 2 + 18 // 4] == pytest.approx(halfway * 1e-3, rel=0.04)

    def test_what_this_machine_cannot_do_is_said_at_once(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune
    ) -> None:
        if not torch.cuda.is_available():
            with pytest.raises(TrainingFailed, match="precision fp16 needs CUDA"):
                train(network, data, precision="fp16")
        with pytest.raises(TrainingFailed, match="report_to abacus: abacus is not supported, only "):
            train(network, data, report_to=["abacus"])
        with pytest.raises(TrainingFailed, match=r"early_stopping_patience needs validation rows .* these 0 are none"):
            train(network, data, early_stopping_patience=1)


class TestRates:
    SMALL = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
    }

    @pytest.mark.parametrize(
        "model_type", ["bert", "distilbert", "roberta", "deberta-v2", "electra", "modernbert", "mpnet"]
    )
    def test_each_layer_learns_slower_than_the_one_above_it(self, model_type: str) -> None:
        sizes = {"dim": 16, "hidden_dim": 16, "n_layers": 3, "n_heads": 2} if model_type == "distilbert" else self.SMALL
        network = ToxicityNetwork.from_config({"model_type": model_type, **self.SMALL, **sizes})
        groups = parameter_groups(network, tiny_settings(learning_rate=1.0, layer_lr_decay=0.5, weight_decay=0.1))
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        # Then each parameter is there once; the heads learn at the full rate and the embeddings at the least
        assert sorted(rates) == sorted(map(id, network.parameters()))
        assert {rates[id(p)] for p in network.heads.parameters()} == {1.0}
        assert rates[id(network.encoder.get_input_embeddings().weight)] == min(rates.values()) == 0.5**4
        # And each of the three layers has its own
        assert set(rates.values()) == {0.5**depth for depth in range(5)}
        for layer in range(3):
            of_layer = {
                rates[id(p)] for name, p in network.named_parameters() if f".{layer}." in name.split("heads")[0]
            }
            assert of_layer == {0.5 ** (3 - layer)}
        # And neither biases nor norms decay
        assert all(decays[id(p)] == (0.1 if p.ndim > 1 else 0) for p in network.parameters())

    def test_layers_that_share_their_weights_count_as_one(self) -> None:
        network = ToxicityNetwork.from_config({"model_type": "albert", **self.SMALL, "embedding_size": 8})
        groups = parameter_groups(network, tiny_settings(learning_rate=1.0, layer_lr_decay=0.5))
        assert {group["lr"] for group in groups} == {1.0, 0.5}

    def test_without_decay_all_learn_alike(self, network: ToxicityNetwork) -> None:
        groups = parameter_groups(network, tiny_settings(learning_rate=1.0))
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1.0, 0.01), (1.0, 0.0)]


class TestValidation:
    def test_the_best_weights_are_kept_and_the_rest_is_not_waited_for(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune, tiny_version: Path
    ) -> None:
        # Given rows apart from the training's, and a rate at which there is soon nothing better to come
        apart = read_csv(TRAIN).take(range(100, 160))
        trained = train(
            network,
            data,
            validation=apart,
            epochs=40,
            learning_rate=2e-2,
            early_stopping_patience=3,
            evaluations_per_epoch=1,
            precision="fp32",
        )
        looks = {
            int(point["step"] or 0): auc
            for point in trained.history
            if (auc := point["validation_mean_roc_auc"]) is not None
        }
        # Then it ended three looks after the best, whose weights it has
        assert trained.stopped_early
        best = max(looks, key=lambda step: looks[step])
        assert trained.best_step == best
        assert max(looks) == best + 3 * 3  # steps in an epoch
        ids, mask = pad(TextEncoder(tiny_version, 64).encode_beginnings(apart.texts))
        with torch.inference_mode():
            logits = network(torch.from_numpy(ids), torch.from_numpy(mask))["logits"].numpy()
        figure = measure(1 / (1 + np.exp(-logits.astype(np.float64))), apart).mean_roc_auc
        assert figure == pytest.approx(looks[best], abs=1e-3)

    def test_the_figure_is_reported_and_the_history_can_be_kept(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune
    ) -> None:
        heard: list[Progress] = []
        trained = train(network, data, heard.append, validation=data, epochs=2, evaluations_per_epoch=1)
        assert heard[-1].validation_auc == trained.history[-1]["validation_mean_roc_auc"] is not None
        assert [point["step"] for point in trained.history if point["validation_loss"] is not None] == [3, 6]
        assert (trained.best_step, trained.stopped_early) == (6, False)
        assert json.loads(json.dumps(trained.history, allow_nan=False)) == trained.history

    def test_rows_of_one_class_give_no_figure(self, network: ToxicityNetwork, data: Dataset, train: FineTune) -> None:
        harmless = replace(data, labels=np.zeros_like(data.labels))
        trained = train(network, data, validation=harmless)
        assert trained.history[-1]["validation_mean_roc_auc"] is None
        assert trained.history[-1]["validation_loss"] is not None


class TestResuming:
    HOW: dict[str, Any] = {"epochs": 4, "checkpoint_steps": 2}

    @pytest.mark.parametrize(
        ("killed_in", "how"),
        [
            (7, {}),
            (11, {"batch_size": 4, "gradient_accumulation": 2}),
            (8, {"early_stopping_patience": 2, "evaluations_per_epoch": 1, "epochs": 6, "learning_rate": 1e-2}),
        ],
        ids=["at the end of an epoch", "in the midst of one", "while the best is kept"],
    )
    def test_a_killed_training_comes_to_the_same_end(
        self,
        network: ToxicityNetwork,
        data: Dataset,
        train: FineTune,
        tmp_path: Path,
        killed_in: int,
        how: dict[str, Any],
    ) -> None:
        # Given a training that nothing disturbed
        how = {**self.HOW, **how, "validation": read_csv(TRAIN).take(range(100, 140))}
        undisturbed, killed, resumed = (copy.deepcopy(network) for _ in range(3))
        expected = train(undisturbed, data, **how)
        shutil.rmtree(tmp_path / "checkpoints")
        # When another is killed, and gone on with from its last checkpoint
        with pytest.raises(InterruptedError):
            train(killed, data, killed_at(killed_in), **how)
        first_steps: list[int | None] = []
        trained = train(resumed, data, lambda progress: first_steps.append(progress.step), resume=True, **how)
        # Then it began there, and both are the same
        assert first_steps[0] == (killed_in - 1) // 2 * 2 + 1
        assert torch.equal(weights(resumed), weights(undisturbed))
        assert trained == expected
        # And a training that had come to its end is not trained a step further
        again = copy.deepcopy(network)
        assert train(again, data, killed_at(1), resume=True, **how) == expected
        assert torch.equal(weights(again), weights(undisturbed))

    def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune, tmp_path: Path
    ) -> None:
        # Given checkpoints after steps 2 and 4, the second without its last file and the mark that comes after it
        folder = tmp_path / "checkpoints"
        with pytest.raises(InterruptedError):
            train(copy.deepcopy(network), data, killed_at(4), **self.HOW)
        shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-4")
        for name in ("trainer_state.json", "complete"):
            (folder / "checkpoint-4" / name).unlink()
        steps: list[int | None] = []
        train(network, data, lambda progress: steps.append(progress.step), resume=True, **self.HOW)
        assert steps[0] == 3
        # And nothing else is left of either in the end
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-12"]

    def test_nobody_else_reads_a_checkpoint_and_none_runs_code(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune, tmp_path: Path
    ) -> None:
        train(network, data, **self.HOW)
        folder = tmp_path / "checkpoints"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        # What is no safetensors, torch reads without running code
        states = [path for path in (folder / "checkpoint-12").iterdir() if path.suffix in (".pt", ".pth", ".bin")]
        assert sorted(path.name for path in states) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
        with safe_globals():
            assert all(torch.load(path, weights_only=True) for path in states)

    def test_a_resume_by_other_settings_or_with_other_rows_is_refused(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune, tmp_path: Path
    ) -> None:
        with pytest.raises(InterruptedError):
            train(copy.deepcopy(network), data, killed_at(4), **self.HOW)
        # Without a word the checkpoints are not overwritten
        with pytest.raises(CheckpointError, match=r"holds an unfinished training, up to step 2: .* --resume"):
            train(network, data, **self.HOW)
        other = copy.deepcopy(network)
        for parameter in other.heads.parameters():
            parameter.data += 1
        for begun, rows, how, said in (
            (
                network,
                data,
                {"learning_rate": 1e-3, "seed": 1},
                r"learning_rate was 0.0005, is 0.001; seed was \d+, is 1\.",
            ),
            (network, data.take(range(19)), {}, "training rows was "),
            (network, replace(data, weights=np.full(ROWS, 2, np.float32)), {}, "training rows was "),
            (network, data, {"validation": data}, "validation rows was "),
            (other, data, {}, "weights at the start was "),
        ):
            with pytest.raises(CheckpointError, match=f"begun by something else, so it cannot be gone on with: {said}"):
                train(begun, rows, resume=True, **{**self.HOW, **how})
        # But what comes after the training may be another
        with pytest.raises(InterruptedError):
            train(copy.deepcopy(network), data, killed_at(4), resume=True, **self.HOW, calibration_texts=99)
        # And a folder whose record is lost is not guessed at
        (tmp_path / "checkpoints" / "run.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"run.json cannot be read"):
            train(network, data, resume=True, **self.HOW)

    def test_where_there_is_nothing_to_resume_it_begins(
        self, network: ToxicityNetwork, data: Dataset, train: FineTune
    ) -> None:
        steps: list[int | None] = []
        train(network, data, lambda progress: steps.append(progress.step), resume=True, **self.HOW)
        assert steps[0] == 1


class TestFolder:
    def test_a_folder_belongs_to_one_process_and_goes_with_its_training(self, tmp_path: Path) -> None:
        with checkpoint_folder(tmp_path / "run") as folder:
            with pytest.raises(CheckpointError, match="another process is training in "), checkpoint_folder(folder):
                pass
            assert folder.is_dir()
        assert not folder.exists()
        # And a link to elsewhere is none
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError), checkpoint_folder(tmp_path / "link"):
            pass
        assert (tmp_path / "elsewhere").is_dir()

    def test_what_an_exception_leaves_is_kept_only_where_it_can_be_resumed(self, tmp_path: Path) -> None:
        with pytest.raises(InterruptedError), checkpoint_folder(tmp_path / "run") as folder:
            (folder / "checkpoint-2").mkdir()
            raise InterruptedError
        assert not folder.exists()
        with pytest.raises(InterruptedError), checkpoint_folder(tmp_path / "run"):
            (folder / "checkpoint-2").mkdir()
            mark_complete(folder / "checkpoint-2")
            raise InterruptedError
        assert last_checkpoint(folder) == folder / "checkpoint-2"
