"""Fine-tuning on transformers.Trainer. Owns the loop's settings and its progress, not the data or the verdict."""

import ctypes
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import SAFE_WEIGHTS_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from config.settings import TrainerSettings
from model.network import ToxicityNetwork
from model.onnx_engine import pad
from model.text import TextEncoder
from trainer import checkpoints
from trainer.dataset import Dataset
from trainer.losses import UNKNOWN, label_loss, positive_weights

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
LOSS_POINTS = 200
"""Looks at the loss in the course of a training; each waits for the device."""
TENSORBOARD = "tensorboard"
AFTER_THE_TRAINING = {
    "checkpoint_steps",
    "report_to",
    "calibration",
    "target_precision",
    "calibration_texts",
    "max_int8_auc_drop",
    "max_label_auc_drop",
    "max_mean_auc_drop",
    "max_label_log_loss_rise",
    "min_label_positives",
    "max_evasion_auc_drop",
    "max_bias_auc_drop",
    "robustness_rows",
}
"""Settings that the trained weights do not depend on: a resume may change them, as when the int8 form was too bad."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. `step` to `seconds_left` are set while training."""

    phase: str
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    validation_auc: float | None = None
    """Mean ROC-AUC at the last look at the validation rows."""
    seconds_left: float | None = None


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class FineTuned:
    """How a training went.

    Attributes:
        loss: mean over all steps.
        history: by `step`, each point with `epoch` and, None where nobody looked, `loss` (mean of the steps since the
            last), `learning_rate` (of the heads), `validation_loss` and `validation_mean_roc_auc`.
        best_step: the step whose weights were kept.
        stopped_early: the validation rows ended it before its last step.
    """

    loss: float
    history: list[dict[str, float | None]]
    best_step: int
    stopped_early: bool


class TrainingFailed(Exception):
    """A run that cannot lead to a version; the message says why, and at which step where it had begun."""


def process_rank() -> int:
    """Which process of a `torchrun` this is: the first, 0, writes, reports and exports. 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def fine_tune(
    network: ToxicityNetwork,
    text_encoder: TextEncoder,
    training: Dataset,
    validation: Dataset,
    settings: TrainerSettings,
    *,
    work_dir: Path,
    report: Report,
    resume: bool = False,
    tensorboard: Path | None = None,
) -> FineTuned:
    """Train the network in place. In a `torchrun` every process calls this, and trains on its share of each step.

    Args:
        validation: rows on which it is measured meanwhile; may be empty.
        work_dir: where checkpoints are kept.
        resume: go on from the last checkpoint in `work_dir`, if there is one.
        tensorboard: folder of TensorBoard's files, where the settings ask for them.

    Raises:
        TrainingFailed: the loss stopped being a number, or a setting does not fit this machine or these rows.
        CheckpointError: `work_dir` holds checkpoints of another run, or of this one and `resume` was not said.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = checkpoints.begin(
        work_dir,
        settings.model_dump(mode="json", exclude=AFTER_THE_TRAINING)
        | {
            "training rows": training.sha256,
            "validation rows": validation.sha256,
            "weights at the start": _sha256(network),
            "processes": processes,
        },
        resume=resume,
        writes=process_rank() == 0,
    )
    set_seed(settings.seed)
    _keep_freed_memory()
    state = _finished(checkpoint) if checkpoint else None
    if state is not None:
        kept = work_dir / f"checkpoint-{state.best_global_step or state.global_step}"
        network.load_state_dict(load_file(kept / SAFE_WEIGHTS_NAME))
    else:
        batches = math.ceil(math.ceil(len(training) / settings.batch_size) / processes)
        steps_per_epoch = math.ceil(batches / settings.gradient_accumulation)
        arguments = _arguments(settings, processes, steps_per_epoch, work_dir, validation)
        rows = _rows(text_encoder, training)
        sampler = DistributedLengthGroupedSampler(
            settings.batch_size * settings.gradient_accumulation * processes,
            lengths=[len(row["input_ids"]) for row in rows],
            # The order of each epoch, before it is dealt out to the processes; from seed and epoch alone, where the
            # Trainer's own sampler would go on from whatever was drawn before, and a resume see other batches.
            num_replicas=1,
            rank=0,
            seed=settings.seed,
        )
        trainer = _Trainer(
            model=network,
            args=arguments,
            train_dataset=rows,
            eval_dataset=_rows(text_encoder, validation) if len(validation) else None,
            data_collator=_collate,
            compute_metrics=_validation_metrics,
            optimizers=(torch.optim.AdamW(parameter_groups(network, settings), fused=True), None),
            callbacks=[
                _Progress(report),
                _Checkpoints(work_dir, settings.checkpoint_steps, sampler, steps_per_epoch),
                *([EarlyStoppingCallback(patience)] if (patience := settings.early_stopping_patience) else []),
                *_trackers(settings.report_to, tensorboard, checkpoint),
            ],
            sampler=sampler,
            positive_weights=positive_weights(training.labels, settings.positive_weights),
            focal_gamma=settings.focal_gamma,
        )
        # Progress is a row in the database, not lines on the output.
        trainer.remove_callback(PrinterCallback)
        if settings.gradient_checkpointing:
            network.encoder.activation_checkpointing_enable()
        network.train()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if settings.gradient_checkpointing:
            network.encoder.activation_checkpointing_disable()
        # Mixed precision wrapped the forward pass; the export and the measuring that follow are in fp32.
        trainer.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
        # All have loaded the best weights before the first process removes the checkpoints. The process group is left
        # to the end of the process: to destroy it, torch waits for gloo threads while it holds the interpreter's lock,
        # for which the thread that frees the last exchanged tensor may be waiting.
        trainer.accelerator.wait_for_everyone()
        state = trainer.state
    network.eval()
    history = _history(state.log_history)
    looks = [point for point in history if point["loss"] is not None]
    steps = np.diff([0, *(point["step"] for point in looks)])
    return FineTuned(
        loss=float(np.average([point["loss"] for point in looks], weights=steps)),
        history=history,
        best_step=state.best_global_step or state.global_step,
        stopped_early=state.global_step < state.max_steps,
    )


def parameter_groups(network: ToxicityNetwork, settings: TrainerSettings) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay, the heads first.

    Each layer learns `layer_lr_decay` times as fast as the one above it: the heads at the full rate, the embeddings
    slowest. An encoder whose layers cannot be told apart, as where all share their weights, counts as one layer. Biases
    and the weights of norms, which are vectors, do not decay.
    """
    depths = _depths(network.encoder)
    top = max(depths.values()) + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        depth = depths.get(name.removeprefix("encoder."), top)
        rate = settings.learning_rate * settings.layer_lr_decay ** (top - depth)
        groups.setdefault((rate, settings.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def _depths(encoder: PreTrainedModel) -> dict[str, int]:
    """How far above the input each parameter of an encoder is: 0 before the first layer, and at most its layers."""
    layers = getattr(encoder.config, "num_hidden_layers", 0)
    prefixes = (
        f"{name}."
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    )
    prefix = next(prefixes, None)
    depths = {}
    depth = 0
    for name, _ in encoder.named_parameters():
        # They come in the order of the forward pass; what stands after the layers, as a last norm, goes with the last.
        if prefix is not None and name.startswith(prefix):
            depth = int(name.removeprefix(prefix).partition(".")[0]) + 1
        depths[name] = depth
    return depths


def _arguments(
    settings: TrainerSettings, processes: int, steps_per_epoch: int, work_dir: Path, validation: Dataset
) -> TrainingArguments:
    on_cuda = torch.cuda.is_available()
    total_steps = math.ceil(steps_per_epoch * settings.epochs)
    stops_early = settings.early_stopping_patience > 0
    if stops_early and math.isnan(_mean_roc_auc(validation.labels, validation.labels)):
        raise TrainingFailed(
            f"early_stopping_patience needs validation rows with both classes of some label; among these "
            f"{len(validation)} are none: raise validation_share, or set the patience to 0"
        )
    between_evaluations = max(1, steps_per_epoch // settings.evaluations_per_epoch)
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=round(total_steps * settings.warmup_ratio),
        lr_scheduler_type=settings.lr_schedule,
        max_grad_norm=settings.max_grad_norm,
        # Batches of like lengths: the same saving of padding as in service.
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        **mixed_precision(settings.precision),
        use_cpu=not on_cuda,
        ddp_backend="gloo" if processes > 1 and not on_cuda else None,
        eval_strategy="steps" if len(validation) else "no",
        eval_steps=between_evaluations,
        metric_for_best_model="mean_roc_auc" if stops_early else None,
        greater_is_better=True,
        load_best_model_at_end=stops_early,
        # The best weights are those of some evaluation. What a resume needs is saved by _Checkpoints.
        save_strategy="steps" if stops_early else "no",
        save_steps=between_evaluations,
        save_only_model=not settings.checkpoint_steps,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        logging_steps=math.ceil(total_steps / LOSS_POINTS),
        logging_first_step=True,
        # The filter would hide the very NaN that must stop the run.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=on_cuda,
    )
    # In one process the Trainer would cut every batch into one part for each GPU it sees, and wait for all; several
    # GPUs are for torchrun.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def mixed_precision(precision: str) -> dict[str, bool]:
    """Which of bf16 and fp16 the forward and backward pass of a training on this machine use; neither is fp32.

    Raises:
        TrainingFailed: this machine has not what is asked for.
    """
    on_cuda = torch.cuda.is_available()
    if precision == "fp16" and not on_cuda:
        raise TrainingFailed("precision fp16 needs CUDA, and this machine trains on its CPU: take auto, bf16 or fp32")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else _cpu_multiplies_bf16()
    if precision == "bf16" and on_cuda and not has_bf16:
        raise TrainingFailed("precision bf16 needs a GPU that computes it, which this one does not: take fp16 or fp32")
    return {"bf16": precision == "bf16" or (precision == "auto" and has_bf16), "fp16": precision == "fp16"}


def _trackers(names: Sequence[str], tensorboard: Path | None, checkpoint: Path | None) -> Iterator[TrainerCallback]:
    try:
        for tracker in get_reporting_integration_callbacks([name for name in names if name != TENSORBOARD]):
            yield tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise TrainingFailed(f"report_to {', '.join(names)}: {error}") from None
    if TENSORBOARD in names and tensorboard is not None and process_rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # here: takes seconds

        # What the killed process wrote after its last checkpoint is written anew.
        purge_step = None if checkpoint is None else checkpoints.step_of(checkpoint) + 1
        yield TensorBoardCallback(SummaryWriter(str(tensorboard), purge_step=purge_step))


def _finished(checkpoint: Path) -> TrainerState | None:
    """The state of a training that had come to its end; to the Trainer it would be one step short."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"] else None


def _history(logs: Sequence[Mapping[str, float]]) -> list[dict[str, float | None]]:
    points: dict[float, dict[str, float | None]] = {}
    for log in logs:
        new = {"step": log["step"], "epoch": log["epoch"], "loss": None, "learning_rate": None}
        point = points.setdefault(log["step"], new | {"validation_loss": None, "validation_mean_roc_auc": None})
        if "loss" in log:
            point |= {"loss": log["loss"], "learning_rate": log["learning_rate"]}
        elif "eval_loss" in log:
            auc = log["eval_mean_roc_auc"]
            point |= {
                "validation_loss": log["eval_loss"],
                "validation_mean_roc_auc": None if math.isnan(auc) else auc,
            }
    return [points[step] for step in sorted(points)]


def _sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(network.state_dict().items()):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 units, which halve the time of a step; emulation would double it."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def _keep_freed_memory() -> None:
    """Let this process reuse large blocks rather than return each to the system and fault it in again.

    A step on a CPU allocates and frees its activations; on glibc's defaults a sixth of its time goes to that.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_TOP_PAD, 1 << 28)


def _rows(text_encoder: TextEncoder, dataset: Dataset) -> list[dict[str, Any]]:
    token_ids = text_encoder.encode_beginnings(dataset.texts)
    return [
        {"input_ids": ids, "labels": labels, "row_weights": weight}
        for ids, labels, weight in zip(token_ids, dataset.labels, dataset.weights, strict=True)
    ]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    input_ids, attention_mask = pad([row["input_ids"] for row in rows])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(np.nan_to_num(np.stack([row["labels"] for row in rows]), nan=UNKNOWN)),
        "row_weights": torch.from_numpy(np.stack([row["row_weights"] for row in rows])),
    }


def _validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    labels = np.where(prediction.label_ids == UNKNOWN, np.nan, prediction.label_ids)
    return {"mean_roc_auc": _mean_roc_auc(labels, prediction.predictions)}


def _mean_roc_auc(labels: NDArray[np.float32], scores: NDArray[np.float32]) -> float:
    """Over the labels of which both classes are there, (rows, 6); NaN where none is. From a half on one is positive."""
    from sklearn.metrics import roc_auc_score  # here: a training without validation rows does without

    known = ~np.isnan(labels)
    truths = [(labels[known[:, i], i] >= 0.5, scores[known[:, i], i]) for i in range(labels.shape[1])]
    figures = [roc_auc_score(truth, score) for truth, score in truths if 0 < truth.sum() < len(truth)]
    return float(np.mean(figures)) if figures else math.nan


class _Trainer(Trainer):
    """With our loss, and batches whose order is known from seed and epoch."""

    def __init__(self, *, sampler: Sampler[int], positive_weights: Tensor, focal_gamma: float, **kwargs: Any) -> None:
        # Given as `compute_loss_func` too, or the Trainer would not count the known labels of all batches of a step.
        super().__init__(compute_loss_func=label_loss, **kwargs)
        self._sampler = sampler
        self._positive_weights = positive_weights.to(self.args.device)
        self._focal_gamma = focal_gamma

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels, row_weights = inputs.pop("labels"), inputs.pop("row_weights")
        outputs = model(**inputs)
        loss = label_loss(
            outputs["logits"],
            labels,
            row_weights,
            self._positive_weights,
            focal_gamma=self._focal_gamma,
            known=num_items_in_batch,
        )
        # The known labels are those of all processes, whose gradients are averaged and not added.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class _Progress(TrainerCallback):
    """Reports each step, and stops a run whose loss is no longer a number."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._loss: float | None = None
        self._validation_auc: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began_at, self._first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps
        if not control.should_log:
            self._say(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:
            return
        self._loss = logs["loss"]
        if not math.isfinite(self._loss):
            raise TrainingFailed(
                f"the loss is {self._loss} at step {state.global_step} of {state.max_steps}; "
                f"a lower learning rate than {args.learning_rate:g} may help"
            )
        self._say(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if not math.isnan(auc := metrics["eval_mean_roc_auc"]):
            self._validation_auc = auc
        self._say(state)

    def _say(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        seconds_each = (time.monotonic() - self._began_at) / (state.global_step - self._first_step)
        seconds_left = seconds_each * (state.max_steps - state.global_step)
        self._report(
            Progress("training", state.global_step, state.max_steps, self._loss, self._validation_auc, seconds_left)
        )


class _Checkpoints(TrainerCallback):
    """Has checkpoints written and says which are whole; and has each epoch, resumed or not, take its own order."""

    def __init__(self, work_dir: Path, every_steps: int, sampler: Any, steps_per_epoch: int) -> None:
        self._work_dir = work_dir
        self._every_steps = every_steps
        self._sampler = sampler
        self._steps_per_epoch = steps_per_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate does so too, but not where several processes resume in the midst of an epoch.
        self._sampler.set_epoch(state.global_step // self._steps_per_epoch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._every_steps:
            # The last one is for a kill in the export.
            control.should_save |= state.global_step % self._every_steps == 0 or state.global_step == state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process has written its own random state
        if not state.is_world_process_zero:
            return
        checkpoint = self._work_dir / f"checkpoint-{state.global_step}"
        if self._every_steps:  # without, there are weights in it and nothing to resume from
            checkpoints.mark_complete(checkpoint)
        best = {self._work_dir / f"checkpoint-{state.best_global_step}"} if state.best_global_step else set()
        checkpoints.remove_others(self._work_dir, {checkpoint} | best)
