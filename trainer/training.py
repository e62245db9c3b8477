"""Fine-tuning on transformers.Trainer. Owns the loop's settings and its progress, not the data or the verdict."""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from config.settings import TrainerSettings
from model.network import ToxicityNetwork
from model.onnx_engine import pad
from model.text import TextEncoder
from trainer.dataset import Dataset

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. `step` to `seconds_left` are set while training."""

    phase: str
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None


Report = Callable[[Progress], None]


class TrainingFailed(Exception):
    """A run that cannot lead to a version; the message says at which step and why."""


def fine_tune(
    network: ToxicityNetwork,
    text_encoder: TextEncoder,
    dataset: Dataset,
    settings: TrainerSettings,
    *,
    work_dir: Path,
    report: Report,
) -> float:
    """Train the network in place and return the mean loss over the run.

    Raises:
        TrainingFailed: the loss stopped being a number.
    """
    set_seed(settings.seed)
    _keep_freed_memory()
    rows = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(text_encoder.encode_beginnings(dataset.texts), dataset.labels, strict=True)
    ]
    total_steps = math.ceil(len(rows) / settings.batch_size * settings.epochs)
    on_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=round(total_steps * settings.warmup_ratio),
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        # Batches of like lengths: the same saving of padding as in service.
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=on_cuda or _cpu_multiplies_bf16(),
        use_cpu=not on_cuda,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        # The filter would hide the very NaN that must stop the run.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
    )
    trainer = Trainer(
        model=network,
        args=arguments,
        train_dataset=rows,
        data_collator=_collate,
        callbacks=[_ProgressCallback(report)],
    )
    # Progress is a row in the database, not lines on the output.
    trainer.remove_callback(PrinterCallback)
    network.train()
    result = trainer.train()
    # Mixed precision wrapped the forward pass; the export and the measuring that follow are in fp32.
    trainer.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    network.eval()
    return float(result.training_loss)


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


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = pad([row["input_ids"] for row in rows])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.stack([torch.from_numpy(row["labels"]) for row in rows]),
    }


class _ProgressCallback(TrainerCallback):
    """Reports each step, and stops a run whose loss is no longer a number."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} at step {state.global_step} of {state.max_steps}; "
                f"a lower learning rate than {args.learning_rate:g} may help"
            )
        seconds_each = (time.monotonic() - self._started) / state.global_step
        seconds_left = seconds_each * (state.max_steps - state.global_step)
        self._report(Progress("training", state.global_step, state.max_steps, loss, seconds_left))
