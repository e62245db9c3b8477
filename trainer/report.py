"""What a version is and why it may be trusted, for people: one HTML page with its figures, and a model card.

Both are drawn from the version's manifest. The page is whole in itself: it asks no network, runs no script, and is
readable on a phone, in the dark and on paper. What a manifest lacks, because an older release wrote it, is left out.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from config.names import LABELS
from model.text import WORDS_FILE
from model.version import ENCODER_FILE, ONNX_FILE, WEIGHTS_FILE, held_out_figures
from trainer import figures as draw
from trainer.calibration import policy_yaml
from trainer.figures import Dot

REPORT_FILE = "report.html"
CARD_FILE = "MODEL_CARD.md"

AREA_METRICS = {"roc_auc": "ROC-AUC", "average_precision": "average precision"}
IDENTITY_METRICS = {"subgroup_auc": "subgroup AUC", "bpsn_auc": "BPSN AUC", "bnsp_auc": "BNSP AUC"}
PART_METRICS = {
    "mean_roc_auc": "mean ROC-AUC",
    **AREA_METRICS,
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "ece": "ECE",
    **IDENTITY_METRICS,
}
"""Of a label, a slice or a group, in the order of a table's columns."""
COUNTS = {"rows": "rows", "positives": "positives", "negatives": "negatives"}
ADVICE = {"best_f1": "For the best F1", "target_precision": "For the precision that was aimed at"}
HISTORY = (
    ("Loss", "loss", {"loss": "training", "validation_loss": "validation"}),
    ("Mean ROC-AUC on the validation rows", "ROC-AUC", {"validation_mean_roc_auc": "validation"}),
)
"""What is drawn of a training: title, axis, and the keys of its points with their names."""
STATES = {
    "promoted": "Promoted: the gate found it no worse than the version that was active",
    "refused": "Refused: the gate did not let it replace the version that was active",
}
ENCODER_LICENCES = {
    "distilbert-base-uncased": "apache-2.0",
    "distilbert/distilbert-base-uncased": "apache-2.0",
    "google-bert/bert-base-uncased": "apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
    "FacebookAI/roberta-base": "mit",
    "FacebookAI/xlm-roberta-base": "mit",
    "microsoft/deberta-v3-small": "mit",
}
"""Of encoders that people often start from, as their own model cards say."""

SECTIONS = {
    "origin": "What it is",
    "verdict": "The gate",
    "labels": "Figures by label",
    "confusion": "Hits and misses",
    "reliability": "Calibration",
    "thresholds": "Advised thresholds",
    "slices": "Slices",
    "identities": "Identities",
    "robustness": "Robustness",
    "int8": "int8 against torch",
    "other": "Also recorded",
    "history": "Training",
    "dataset": "Data",
    "settings": "Settings",
    "use": "Intended use, and limits",
    "misses": "Worst misses",
}
"""Of the page, in the order that a reader asks; one that has nothing to tell is left out."""

TOLD = {
    *("holdout_int8", "holdout_fp32", "int8", "int8_largest_difference"),
    "score_histogram",  # for drift to be measured by, not for people
    *("training_loss", "best_step", "stopped_early", "history"),
}
"""Of a manifest's metrics, those that have a place of their own."""
ROUGH_POSITIVES = 50
"""With fewer of them a label's figures are rough."""
VALUE = "value"
"""Column of a table of plain facts."""
WEIGHT_FILES = (WEIGHTS_FILE, ONNX_FILE)
MISS_CHARS = 600
SMALLEST_ROC_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a report. Each row begins with its name; a cell's second line is what is said in small print."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Miss:
    """A held-out comment that a version scores contrary to its label. Holds the comment's text."""

    label: str
    positive: bool
    """What the label is: a miss with a high score, or with a low one."""
    score: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of a version on some rows, in the form of `Evaluation.as_dict`."""

    figures: Mapping[str, Any]
    on: str
    """Which rows those are, in words."""
    scores: NDArray[np.float32] | None = None
    """(rows, 6); with `truth`, for the curves."""
    truth: NDArray[np.float32] | None = None
    """(rows, 6), NaN where unknown."""
    misses: Sequence[Miss] = field(default=())


def write_report(
    directory: Path,
    facts: Mapping[str, Any],
    *,
    scores: NDArray[np.float32] | None = None,
    truth: NDArray[np.float32] | None = None,
) -> None:
    """Write report.html and MODEL_CARD.md of a version into its directory: last, but for the manifest, which hashes
    them. Neither holds a comment.

    Args:
        directory: with the version's other files, whose sizes are told.
        facts: what the manifest will say: the argument of `model.version.write_manifest`.
        scores: of the held-out rows in the form that ships, (rows, 6); the curves are left out without them.
        truth: the labels of these rows, (rows, 6), NaN where unknown.
    """
    measured = measured_at_training(facts, scores=scores, truth=truth)
    (directory / REPORT_FILE).write_text(render_page(directory, facts, measured), encoding="utf-8")
    (directory / CARD_FILE).write_text(render_card(directory, facts), encoding="utf-8")


def measured_at_training(
    facts: Mapping[str, Any],
    *,
    scores: NDArray[np.float32] | None = None,
    truth: NDArray[np.float32] | None = None,
) -> Measured:
    """The figures that a version's manifest holds, of the form that ships where they are told apart."""
    shipped = held_out_figures(facts["metrics"])
    return Measured(figures=shipped, on="the held-out rows, when it was trained", scores=scores, truth=truth)


def render_page(
    directory: Path,
    facts: Mapping[str, Any],
    measured: Measured,
    *,
    verdict: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page of a version. It holds comments only where `measured` has misses, and says so then.

    Args:
        directory: of the version.
        facts: its manifest.
        measured: what the figures are of.
        verdict: state and reason of the training run that wrote it, where there was one, and the gate's comparisons.
        notes: what a reader should know of how the page came about.
    """
    context = {
        **_context(directory, facts, measured.figures),
        "measured": measured,
        "verdict": verdict,
        "comparisons": _comparison_table((verdict or {}).get("comparisons") or []),
        "misses": _miss_tables(measured.misses),
        "notes": notes,
        **_drawings(facts["metrics"].get("history") or [], measured),
    }
    sections = {name: title for name, title in SECTIONS.items() if context.get(name, True)}
    template = _templates().get_template("report.html.jinja")
    return template.render(context, sections=sections, states=STATES).strip() + "\n"


def render_card(directory: Path, facts: Mapping[str, Any]) -> str:
    """The model card of a version, in Markdown, with the front matter that the Hugging Face hub reads."""
    context = _context(directory, facts, measured_at_training(facts).figures)
    front = {
        "license": context["licence"],
        "base_model": context["encoder"] if context["licence"] else None,
        "pipeline_tag": "text-classification",
        "tags": ["toxicity", "comment-moderation", "multi-label"],
        "model-index": _model_index(facts, context["figures"]),
    }
    header = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    body = _templates().get_template("model_card.md.jinja").render(context)
    return f"---\n{header}---\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def render_dataset_card(card: Mapping[str, Any]) -> str:
    """The card of `trainer.assembly.TrainingData` in Markdown, with the front matter that Hugging Face's hub reads."""
    parts = {name: card[name] for name in ("training", "validation", "holdout")}
    fate = {
        "read": sum(source["rows"] for source in card["sources"]),
        "dropped: no label is known": card["unlabelled_dropped"],
        "dropped: held out too": card["leaks_dropped"],
        "merged with the same text": card["duplicates_merged"],
        "dropped: corrected by reviewers": card["corrections"]["replaced"],
        "left out by max_rows": card["not_drawn"],
        "kept apart for validation": card["validation"]["rows"],
        "added: corrections, repeated": card["corrections"]["rows"] * card["corrections"]["repeats"],
        "added: rows with rare labels, repeated": card["added"]["oversampled"],
        "added: copies as evaders write": card["added"]["evasive"],
        "added: copies with synonyms": card["added"]["reworded"],
        "trained on": card["training"]["rows"],
    }
    front = {"task_categories": ["text-classification"], "tags": ["toxicity", "comment-moderation", "multi-label"]}
    context = {
        "sha256": card["sha256"],
        "notes": card["notes"],
        "sources": _table(
            "Sources",
            "source",
            {
                source["name"]: {"rows": _shown(source["rows"]), "sha256": source["sha256"]}
                for source in card["sources"]
            },
        ),
        "fate": Table("", ["rows", ""], [[name, _shown(count)] for name, count in fate.items()]),
        "labels": [
            table
            for name, part in parts.items()
            for table in _table(
                f"{name.capitalize()}, {_shown(part['rows'])} rows, sha256 {part['sha256']}",
                "label",
                {
                    label: {kind: _shown(part[kind][label]) for kind in ("positives", "negatives", "unknown")}
                    | ({"contradictory": _shown(card["contradictions"][label])} if name == "training" else {})
                    for label in LABELS
                },
            )
        ],
        "lengths": Table(
            "",
            ["rows", *card["training"]["characters"]],
            [[name, *map(_shown, part["characters"].values())] for name, part in parts.items()],
        ),
    }
    body = _templates().get_template("dataset_card.md.jinja").render(context)
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def worst_misses(
    texts: Sequence[str],
    scores: NDArray[np.float32],
    truth: NDArray[np.float32],
    *,
    thresholds: Mapping[str, float],
    most: int,
) -> list[Miss]:
    """Per label the highest scores of comments that do not have it, and the lowest of those that do.

    Args:
        texts: of the comments.
        scores: (texts, 6)
        truth: (texts, 6), NaN where unknown.
        thresholds: by label: from where a score counts as positive.
        most: of each kind and label.
    """
    misses = []
    for column, label in enumerate(LABELS):
        flagged = scores[:, column] >= thresholds[label]
        for positive in (False, True):
            missed = np.flatnonzero((truth[:, column] == positive) & (flagged != positive))
            ordered = missed[np.argsort(scores[missed, column] * (1 if positive else -1), kind="stable")]
            misses += [Miss(label, positive, float(scores[row, column]), texts[row]) for row in ordered[:most]]
    return misses


def tables(
    caption: str, facts: Mapping[str, Any], *, name: str = "name", show: Callable[[object], str] | None = None
) -> list[Table]:
    """Any nested facts as tables, those within under their own names.

    Mappings with the same keys become the rows of one table, or its columns where that is narrower.
    """
    show = show or _shown
    plain = {key: {VALUE: show(value)} for key, value in facts.items() if not _is_nested(value)}
    found = _table(caption, name, plain)
    alike: dict[tuple[str, ...], dict[str, Mapping[str, object]]] = {}
    for key, value in facts.items():
        if isinstance(value, list) and _is_nested(value):
            found += _table(_words(key), name, dict(_entry(n, entry, show) for n, entry in enumerate(value, 1)))
        elif _is_nested(value) and any(map(_is_nested, value.values())):
            for table in tables(_words(key), value, name=name, show=show):
                prefix = "" if table.caption == _words(key) else f"{_words(key)}: "
                found.append(replace(table, caption=prefix + table.caption))
        elif _is_nested(value):
            alike.setdefault(tuple(value), {})[key] = value
    for keys, group in alike.items():
        rows = {key: {_words(column): show(value) for column, value in entry.items()} for key, entry in group.items()}
        if len(group) == 1:
            rows = {row: {VALUE: cell} for row, cell in rows.popitem()[1].items()}
        elif len(keys) > len(group):
            rows = {row: {_words(key): show(entry[row]) for key, entry in group.items()} for row in keys}
        found += _table(", ".join(map(_words, group)), name, rows)
    return found


def recipe(facts: Mapping[str, Any]) -> str | None:
    """Every setting of a version's training, as `moderato train --config` reads them.

    None where they are not those of one training.
    """
    settings = facts["settings"]
    if "train_files" not in settings:
        return None
    # What is fine-tuned from a version starts from no encoder.
    used = {key: value for key, value in settings.items() if key != "encoder" or not facts["parent"]}
    return yaml.safe_dump(used, sort_keys=False, allow_unicode=True)


# --- What both documents tell ------------------------------------------------------------------------------------


def _context(directory: Path, facts: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    encoder = _encoder(facts)
    metrics = facts["metrics"]
    return {
        "name": facts["version"],
        "parent": facts["parent"],
        "encoder": encoder,
        "licence": ENCODER_LICENCES.get(encoder or ""),
        "origin": _origin(directory, facts, encoder),
        "figures": figures,
        "glance": _glance(figures),
        "labels": _label_table(figures),
        "rough_positives": ROUGH_POSITIVES,
        "rough": [label for label, each in figures.get("labels", {}).items() if each["positives"] < ROUGH_POSITIVES],
        "intervals": any(each.get("intervals") for each in figures.get("labels", {}).values()),
        "confusion": _confusion_tables(figures),
        "thresholds": _threshold_tables(facts.get("thresholds") or {}),
        "slices": _table(
            "ROC-AUC and positives are those of toxic", "slice", _measured_rows(figures.get("slices") or {})
        ),
        "identities": _identity_table(figures),
        "seldom": [
            f"{_words(group)} ({each['rows']:,})"
            for group, each in (figures.get("identities") or {}).items()
            if not _has_areas(each)
        ],
        "robustness": _robustness_table(figures.get("robustness") or {}),
        "int8": _int8_table(metrics),
        "int8_largest_difference": (metrics.get("int8") or _measured_by_form(metrics))["largest_difference"],
        "calibration": _calibration_table(facts.get("calibration") or {}),
        "policy": policy_yaml(facts["thresholds"]) if facts.get("thresholds") else None,
        "training": metrics,
        "other": tables("Figures", {key: value for key, value in metrics.items() if key not in TOLD}),
        "dataset": tables("Data", facts["dataset"]),
        "settings": tables("Settings", facts["settings"], name="setting", show=_as_written),
        "recipe": recipe(facts),
        "again": f"{facts['version']}-again",
        "weights": facts["weights"],
    }


def _encoder(facts: Mapping[str, Any]) -> str | None:
    """The pretrained encoder it started from; None where it started from another version and nothing says more."""
    named = facts["dataset"].get("encoder") or (None if facts["parent"] else facts["settings"].get("encoder"))
    return None if named is None else str(named)


def _origin(directory: Path, facts: Mapping[str, Any], encoder: str | None) -> dict[str, str]:
    network = json.loads((directory / ENCODER_FILE).read_text(encoding="utf-8"))
    layers = network.get("num_hidden_layers") or network.get("n_layers")
    width = network.get("hidden_size") or network.get("dim")
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name in WEIGHT_FILES}
    origin = {
        "made": facts["created_at"].replace("T", " ").replace("+00:00", " UTC"),
        "from version": facts["parent"],
        "from encoder": encoder,
        "network": network["model_type"] + (f", {layers} layers of {width}" if layers and width else ""),
        "reads": f"{facts['max_length']} tokens at once; longer texts in overlapping windows",
        "disguised words": "read as the words they stand for" if (directory / WORDS_FILE).is_file() else None,
        "stored weights": facts["weights"],
        "files": ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()),
        "trained with": ", ".join(f"{name} {version}" for name, version in facts["libraries"].items()),
    }
    return {key: value for key, value in origin.items() if value}


def _glance(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that say most: name, value, and what to know of it."""
    found = []
    if (mean := figures.get("mean_roc_auc")) is not None:
        interval = _interval(figures.get("mean_roc_auc_interval"))
        found.append(("mean ROC-AUC", f"{mean:.3f}", interval or f"on {figures['rows']:,} held-out rows"))
    if known := {k: v for k, v in figures.get("labels", {}).items() if v.get("roc_auc") is not None}:
        worst = min(known, key=lambda label: float(known[label]["roc_auc"]))
        found.append(("lowest ROC-AUC of a label", f"{known[worst]['roc_auc']:.3f}", worst))
    if (f1 := (figures.get("macro") or {}).get("f1")) is not None:
        found.append(("macro F1", f"{f1:.3f}", "each label at its threshold"))
    if losses := _losses(figures.get("robustness") or {}):
        worst = max(losses, key=lambda evasion: losses[evasion])
        found.append(("largest loss by an evasion", f"{losses[worst]:.3f}", f"{_words(worst)}, mean ROC-AUC"))
    bpsn = {k: v["bpsn_auc"] for k, v in (figures.get("identities") or {}).items() if v.get("bpsn_auc") is not None}
    if bpsn:
        worst = min(bpsn, key=lambda group: float(bpsn[group]))
        found.append(("lowest BPSN AUC", f"{bpsn[worst]:.3f}", f"harmless comments that mention {_words(worst)}"))
    return found


def _label_table(figures: Mapping[str, Any]) -> list[Table]:
    rows = _measured_rows(figures.get("labels", {}))
    over_all = {f"{name} average": figures[name] for name in ("micro", "macro") if figures.get(name)}
    if not over_all and figures.get("mean_roc_auc") is not None:
        over_all = {"mean": {"roc_auc": figures["mean_roc_auc"]}}
    return _table("Each label, and all of them", "label", rows | _measured_rows(over_all))


def _measured_rows(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """A row for each part: its counts, and its figures with their intervals."""
    rows = {}
    for part, measured in parts.items():
        row = {title: _shown(measured[key]) for key, title in COUNTS.items() if key in measured}
        for key, title in PART_METRICS.items():
            if measured.get(key) is not None:
                interval = _interval((measured.get("intervals") or {}).get(key))
                row[title] = f"{measured[key]:.3f}" + (f"\n{interval}" if interval else "")
        rows[_words(part)] = row
    return rows


def _confusion_tables(figures: Mapping[str, Any]) -> list[Table]:
    found = []
    for label, measured in figures.get("labels", {}).items():
        if not (cells := measured.get("confusion")):
            continue

        def row(hit_or_miss: Sequence[str], cells: Mapping[str, int] = cells) -> list[str]:
            total = sum(cells[key] for key in hit_or_miss) or 1
            return [f"{cells[key]:,}\n{cells[key] / total:.1%} of these" for key in hit_or_miss]

        found.append(
            Table(
                f"{label}, flagged from {measured['threshold']:.2f}",
                ["comments that", "are flagged", "are not"],
                [[f"are {label}", *row(("tp", "fn"))], ["are not", *row(("fp", "tn"))]],
            )
        )
    return found


def _calibration_table(calibration: Mapping[str, Any]) -> list[Table]:
    rows = {
        label: {_words(key).replace("ece", "ECE"): _shown(value) for key, value in fitted.items()}
        for label, fitted in calibration.items()
    }
    return _table("What was fitted to the validation rows: scale × logit + shift", "label", rows)


def _threshold_tables(thresholds: Mapping[str, Any]) -> list[Table]:
    found: list[Table] = []
    for advice, title in ADVICE.items():
        rows = {
            label: {key.replace("f1", "F1"): _shown(value) for key, value in each[advice].items()}
            for label, each in thresholds.items()
            if each.get(advice)
        }
        found += _table(title, "label", rows)
    return found


def _identity_table(figures: Mapping[str, Any]) -> list[Table]:
    groups = {group: each for group, each in (figures.get("identities") or {}).items() if _has_areas(each)}
    rows = _measured_rows(groups)
    if rows and (means := figures.get("identity_means")):
        rows |= _measured_rows({"generalised mean": means})
    return _table("Toxic scores where a group is mentioned", "group", rows)


def _has_areas(measured: Mapping[str, Any]) -> bool:
    return any(measured.get(key) is not None for key in IDENTITY_METRICS)


def _robustness_table(robustness: Mapping[str, Any]) -> list[Table]:
    losses = _losses(robustness)
    rows = {}
    for written in ("plain", *losses) if losses else ():
        areas = {key: f"{area:.3f}" for key, area in robustness[written].items() if area is not None}
        loss = f"{losses[written]:.3f}" if written in losses else ""
        name = _words(written) if written in losses else "as they are"
        rows[name] = {"mean": areas.pop("mean"), "loss": loss, **areas}
    return _table(f"ROC-AUC on {robustness['rows']:,} rows", "written", rows) if losses else []


def _losses(robustness: Mapping[str, Any]) -> dict[str, float]:
    """How much mean ROC-AUC each evasion costs."""
    plain = (robustness.get("plain") or {}).get("mean")
    return {
        evasion: plain - measured["mean"]
        for evasion, measured in robustness.items()
        if isinstance(measured, Mapping) and evasion != "plain" and None not in (plain, measured.get("mean"))
    }


def _int8_table(metrics: Mapping[str, Any]) -> list[Table]:
    rows = {
        label: {"int8": f"{auc['int8']:.4f}", "torch, fp32": f"{auc['torch']:.4f}"}
        | {"change": f"{auc['int8'] - auc['torch']:+.4f}"}
        for label, auc in (metrics.get("int8") or _measured_by_form(metrics))["roc_auc"].items()
        if None not in (auc["int8"], auc["torch"])
    }
    return _table("ROC-AUC of both forms on the held-out rows", "label", rows)


def _measured_by_form(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `trainer.soundness.compare_int8` gives, of a manifest that holds the figures of both forms."""
    int8, fp32 = (metrics.get(form, {}).get("labels", {}) for form in ("holdout_int8", "holdout_fp32"))
    aucs = {
        label: {"torch": fp32[label].get("roc_auc"), "int8": int8[label].get("roc_auc")}
        for label in fp32
        if label in int8
    }
    return {"roc_auc": aucs, "largest_difference": metrics.get("int8_largest_difference")}


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows = {}
    for each in comparisons:
        low, high = each["interval"]
        rows[f"{each['figure']}, {each['of']}"] = {
            "active": f"{each['active']:.4f}",
            "candidate": f"{each['candidate']:.4f}",
            "worse by": f"{each['worse_by']:+.4f}\n{low:+.4f} to {high:+.4f}",
            "at most": "" if each["bar"] is None else f"{each['bar']:g}",
            "verdict": "too few to judge" if each["bar"] is None else "passed" if each["passed"] else "not passed",
        }
    return _table("On the same held-out rows", "figure", rows)


def _model_index(facts: Mapping[str, Any], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured = [
        {"type": key, "name": f"{AREA_METRICS[key]}, {label}", "value": round(each[key], 4)}
        for label, each in figures.get("labels", {}).items()
        for key in AREA_METRICS
        if each.get(key) is not None
    ]
    if not measured:
        return []
    data = {"name": "held-out rows", "type": f"sha256:{figures['dataset_sha256']}"}
    task = {"type": "text-classification", "name": "comment moderation"}
    return [{"name": facts["version"], "results": [{"task": task, "dataset": data, "metrics": measured}]}]


def _miss_tables(misses: Iterable[Miss]) -> list[Table]:
    found: dict[str, Table] = {}
    for miss in misses:
        kind = "have it and score low" if miss.positive else "do not have it and score high"
        caption = f"{miss.label}: comments that {kind}"
        table = found.setdefault(caption, Table(caption, ["score", "comment"], []))
        text = miss.text if len(miss.text) <= MISS_CHARS else miss.text[: MISS_CHARS - 1] + "…"
        # Control characters are no HTML, and others of them could turn the text around.
        shown = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
        table.rows.append([f"{miss.score:.3f}", shown])
    return [*found.values()]


# --- Drawings ----------------------------------------------------------------------------------------------------


def _drawings(history: Sequence[Mapping[str, Any]], measured: Measured) -> dict[str, Any]:
    found = measured.figures
    labels: Mapping[str, Any] = found.get("labels", {})
    drawings: dict[str, Any] = {
        "by_label": _dots("Figures by label", labels, AREA_METRICS, axis="area under the curve"),
        "identity_dots": _dots("AUC by identity", found.get("identities") or {}, IDENTITY_METRICS, axis="AUC of toxic"),
        "curves": _curves(measured),
        "reliability": [
            (label, each["ece"], draw.reliability(label, each["reliability"]))
            for label, each in labels.items()
            if each.get("reliability")
        ],
        "evasion_dots": None,
        "history": [],
    }
    if losses := _losses(robustness := found.get("robustness") or {}):
        rows = {_words(evasion): {"obfuscated": Dot(robustness[evasion]["mean"])} for evasion in losses}
        reference = ("as they are", float(robustness["plain"]["mean"]))
        drawings["evasion_dots"] = draw.dots("Robustness to evasions", rows, axis="mean ROC-AUC", reference=reference)
    for title, axis, series in HISTORY:
        known = {key: name for key, name in series.items() if any(point.get(key) is not None for point in history)}
        if known:
            drawings["history"].append((title, draw.history(title, history, known, axis=axis)))
    return drawings


def _dots(title: str, parts: Mapping[str, Any], metrics: Mapping[str, str], *, axis: str) -> Markup | None:
    rows = {}
    for part, measured in parts.items():
        intervals = measured.get("intervals") or {}
        known = {
            name: Dot(measured[key], tuple(intervals[key]) if intervals.get(key) else None)
            for key, name in metrics.items()
            if measured.get(key) is not None
        }
        if known:
            rows[_words(part)] = known
    return draw.dots(title, rows, axis=axis) if rows else None


def _curves(measured: Measured) -> list[Markup]:
    if measured.scores is None or measured.truth is None:
        return []
    roc, precision_recall = {}, {}
    for column, label in enumerate(LABELS):
        known = ~np.isnan(measured.truth[:, column])
        truth, scores = measured.truth[known, column] >= 0.5, measured.scores[known, column]
        if truth.any() and not truth.all():
            false_positives, true_positives, _ = roc_curve(truth, scores)
            roc[label] = np.maximum(false_positives, SMALLEST_ROC_RATE), true_positives
            precision, recall, _ = precision_recall_curve(truth, scores)
            precision_recall[label] = recall, precision
    return [draw.roc_curves(roc), draw.precision_recall_curves(precision_recall)] if roc else []


# --- Words -------------------------------------------------------------------------------------------------------


def _table(caption: str, name: str, rows: Mapping[str, Mapping[str, str]]) -> list[Table]:
    """One table, with the columns that any row has something in; none where there are none."""
    every = dict.fromkeys(column for row in rows.values() for column in row)
    columns = [column for column in every if any(row.get(column) for row in rows.values())]
    if not columns:
        return []
    return [Table(caption, [name, *columns], [[key, *(row.get(c, "") for c in columns)] for key, row in rows.items()])]


def _entry(number: int, entry: Mapping[str, Any], show: Callable[[object], str]) -> tuple[str, dict[str, str]]:
    """A row for an entry of a list, called by its place and by what it says first."""
    (_, first), *others = entry.items()
    return f"{number}. {show(first)}", {_words(key): show(value) for key, value in others}


def _is_nested(value: object) -> bool:
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(isinstance(entry, Mapping) and entry for entry in entries)


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""


def _shown(value: object) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


def _as_written(value: object) -> str:
    """As it stands in a settings file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _words(name: str) -> str:
    return name if name in LABELS else name.replace("_", " ")


def _fenced(text: str, language: str = "") -> Markup:
    """A Markdown code block that nothing in the text ends early."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _markdown(table: Table) -> Markup:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(_markdown_cell(cell) for cell in cells) + " |"

    return Markup("\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)]))


def _markdown_cell(cell: str) -> str:
    """What is markup in a cell is shown as it is written."""
    value, _, note = cell.partition("\n")
    shown = f"{value} ({note})" if note else value
    return re.sub(r"([\\|<>&*`\[\]])", r"\\\1", " ".join(shown.split()))


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fenced": _fenced, "markdown": _markdown}
    return environment
