"""What a run trains on: its sources without duplicates and leaks, the corrections, and the validation rows apart.

Everything is drawn by the settings' seed: the same files, reviews and settings give the same rows in the same order.
"""

import hashlib
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.settings import TrainerSettings, relative_to_root
from config.table_files import AS_FOUND, Form
from trainer.augmentation import evasive_copies, repeats, synonym_copies
from trainer.dataset import Dataset, concatenate, merge_duplicates, near_key, text_key
from trainer.sources import read_sources

FEW_VALIDATION_ROWS = 300

Keys = NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run learns from, what it is tuned on, and how both came about.

    Attributes:
        card: counts and hashes, JSON-ready; the manifest keeps it as `dataset`.
    """

    training: Dataset
    validation: Dataset
    card: dict[str, Any]


def assemble(settings: TrainerSettings, corrections: Dataset, holdout: Dataset, form: Form = AS_FOUND) -> TrainingData:
    """Read the sources of the settings and make of them and of the corrections what a run trains on.

    A row whose text is held out, with other punctuation too, is dropped, or the gate would judge what was learnt by
    heart. A correction replaces a row of the same text. The validation rows come from the sources alone: corrections
    are the decisions that went wrong, and scores calibrated on those would be wrong on all others.

    Raises:
        DatasetError: a source cannot be read.
    """
    replay_rng, validation_rng, evasion_rng, synonym_rng = (
        np.random.default_rng([settings.seed, step]) for step in range(4)
    )
    parts = read_sources(settings, form)
    held_out = {near_key(text_key(text)) for text in holdout.texts}
    rows, keys, near, counts = _unique(concatenate(parts), held_out)
    corrected, corrected_keys, corrected_near, correction_counts = _unique(corrections, held_out)

    usable = np.flatnonzero(~_is_in(set(corrected_keys), keys))
    order = replay_rng.permutation(usable)
    drawn = order[: settings.max_rows] if settings.max_rows else order
    replayed, near = rows.take(drawn), near[drawn]

    is_validation = choose_validation(
        replayed.labels, near, set(corrected_near), share=settings.validation_share, rng=validation_rng
    )
    validation = replayed.take(np.flatnonzero(is_validation))
    plain = concatenate([replayed.take(np.flatnonzero(~is_validation)), *[corrected] * settings.correction_repeats])
    oversampled = plain.take(np.repeat(np.arange(len(plain)), repeats(plain.labels, settings.oversample_share)))
    # By chance a copy may be spelt like a row that is kept apart.
    apart = held_out | set(near[is_validation])
    evasive = _without(apart, evasive_copies(oversampled, settings.evasion_share, evasion_rng))
    reworded = _without(apart, synonym_copies(oversampled, settings.synonym_share, synonym_rng))
    training = concatenate([oversampled, evasive, reworded])

    described = {"training": training.describe(), "validation": validation.describe(), "holdout": holdout.describe()}
    card = {
        "sha256": hashlib.sha256("".join(part["sha256"] for part in described.values()).encode()).hexdigest(),
        "sources": [
            {"name": relative_to_root(name), "rows": len(part), "sha256": part.sha256}
            for name, part in zip(settings.train_files, parts, strict=True)
        ],
        **counts,
        "corrections": {
            "rows": len(corrected),
            "repeats": settings.correction_repeats,
            "replaced": len(rows) - len(usable),
            "mean_weight": round(float(corrected.weights.mean()), 4) if len(corrected) else None,
            **correction_counts,
        },
        "not_drawn": len(usable) - len(drawn),
        "added": {
            "oversampled": len(oversampled) - len(plain),
            "evasive": len(evasive),
            "reworded": len(reworded),
        },
        **described,
        "notes": _notes(training, validation),
    }
    return TrainingData(training, validation, card)


def choose_validation(
    labels: NDArray[np.float32], near: Keys, barred: Set[str], *, share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which rows are kept apart in training: a share of the positives of every label, and of the rows without any.

    Rows are drawn by group. A group that is larger than what is still wanted is passed over, so that a campaign of one
    text does not become the validation.

    Args:
        labels: (rows, 6).
        near: (rows,), the rows' `near_key`; rows with the same one stay together.
        barred: keys of texts that are trained on in any case.
    """
    is_positive = labels == 1
    # A row with several labels stands for its rarest; one with none, for the labels that are known to be absent.
    strata = (~np.isnan(labels)) @ (1 << np.arange(labels.shape[1]))
    for label in np.argsort(-is_positive.sum(axis=0), kind="stable"):
        strata[is_positive[:, label]] = -1 - label
    is_free = ~_is_in(barred, near)
    chosen: set[str] = set()
    for stratum in np.unique(strata):
        members = np.flatnonzero((strata == stratum) & is_free)
        groups = Counter(near[rng.permutation(members)])
        wanted = round(share * len(members))
        if share and stratum < 0 and len(groups) > 1:
            wanted = max(wanted, 1)
        # Groups that other strata chose have rows of this one too.
        wanted -= sum(rows for group, rows in groups.items() if group in chosen)
        fitting = []
        for group, rows in groups.items():
            if group not in chosen and rows <= wanted:
                fitting.append(group)
                wanted -= rows
        if not fitting and wanted > 0 and len(groups) > 1:
            fitting = [min(groups, key=groups.__getitem__)]
        chosen.update(fitting)
    return _is_in(chosen, near)


def _unique(rows: Dataset, held_out: Set[str]) -> tuple[Dataset, Keys, Keys, dict[str, Any]]:
    """One row for each text that is labelled and not held out; their `text_key` and `near_key`; what was dropped."""
    keys = np.array([text_key(text) for text in rows.texts], dtype=object)
    near = np.array([near_key(key) for key in keys], dtype=object)
    is_labelled = ~np.isnan(rows.labels).all(axis=1)
    is_leak = is_labelled & _is_in(held_out, near)
    kept = np.flatnonzero(is_labelled & ~is_leak)
    unique, first, contradictions = merge_duplicates(rows.take(kept), keys[kept])
    counts = {
        "unlabelled_dropped": int((~is_labelled).sum()),
        "leaks_dropped": int(is_leak.sum()),
        "duplicates_merged": len(kept) - len(unique),
        "contradictions": contradictions,
    }
    return unique, keys[kept][first], near[kept][first], counts


def _without(apart: Set[str], copies: Dataset) -> Dataset:
    return copies.take([i for i, text in enumerate(copies.texts) if near_key(text_key(text)) not in apart])


def _is_in(some: Set[str], keys: Keys) -> NDArray[np.bool_]:
    return np.array([key in some for key in keys], dtype=bool)


def _notes(training: Dataset, validation: Dataset) -> list[str]:
    if not len(training):
        return ["No row is left to train on: the sources are empty, or every text in them is held out too."]
    if len(validation) >= FEW_VALIDATION_ROWS:
        return []
    return [
        f"Only {len(validation)} validation rows: too few to choose thresholds by, to calibrate rare labels or to stop "
        "early. More training rows or a larger validation_share would give more."
    ]
