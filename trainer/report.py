"""What a version is and why it may be trusted, for people: one HTML page with its figures, and a model card.

Both are drawn from the version's manifest. The page is whole in itself: it asks no network, runs no script, and is
readable on a phone, in the dark and on paper. What a manifest lacks, because an older release wrote it, is left out.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from trainer.report_tables import (
    AREA_METRICS,
    IDENTITY_METRICS,
    Table,
    calibration_table,
    comparison_table,
    confusion_tables,
    evasion_losses,
    has_areas,
    identity_table,
    in_words,
    int8_table,
    interval_words,
    label_table,
    measured_by_form,
    measured_rows,
    robustness_table,
    shown,
    table_of,
    tables,
    threshold_tables,
)

REPORT_FILE = "report.html"
CARD_FILE = "MODEL_CARD.md"

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
WEIGHT_FILES = (WEIGHTS_FILE, ONNX_FILE)
MISS_CHARS = 600
SMALLEST_ROC_RATE = 1e-3


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
        "comparisons": comparison_table((verdict or {}).get("comparisons") or []),
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
        "sources": table_of(
            "Sources",
            "source",
            {source["name"]: {"rows": shown(source["rows"]), "sha256": source["sha256"]} for source in card["sources"]},
        ),
        "fate": Table("", ["rows", ""], [[name, shown(count)] for name, count in fate.items()]),
        "labels": [
            table
            for name, part in parts.items()
            for table in table_of(
                f"{name.capitalize()}, {shown(part['rows'])} rows, sha256 {part['sha256']}",
                "label",
                {
                    label: {kind: shown(part[kind][label]) for kind in ("positives", "negatives", "unknown")}
                    | ({"contradictory": shown(card["contradictions"][label])} if name == "training" else {})
                    for label in LABELS
                },
            )
        ],
        "lengths": Table(
            "",
            ["rows", *card["training"]["characters"]],
            [[name, *map(shown, part["characters"].values())] for name, part in parts.items()],
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
        "labels": label_table(figures),
        "rough_positives": ROUGH_POSITIVES,
        "rough": [
            label for label, each in figures.get("labels", {}).items() if 0 < each["positives"] < ROUGH_POSITIVES
        ],
        "without_positives": [label for label, each in figures.get("labels", {}).items() if not each["positives"]],
        "intervals": any(each.get("intervals") for each in figures.get("labels", {}).values()),
        "confusion": confusion_tables(figures),
        "thresholds": threshold_tables(facts.get("thresholds") or {}),
        "slices": table_of(
            "ROC-AUC and positives are those of toxic", "slice", measured_rows(figures.get("slices") or {})
        ),
        "identities": identity_table(figures),
        "seldom": [
            f"{in_words(group)} ({each['rows']:,})"
            for group, each in (figures.get("identities") or {}).items()
            if not has_areas(each)
        ],
        "robustness": robustness_table(figures.get("robustness") or {}),
        "int8": int8_table(metrics),
        "int8_largest_difference": (metrics.get("int8") or measured_by_form(metrics))["largest_difference"],
        "calibration": calibration_table(facts.get("calibration") or {}),
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
        interval = interval_words(figures.get("mean_roc_auc_interval"))
        rows = f"on {figures['rows']:,} row{'' if figures['rows'] == 1 else 's'}"
        found.append(("mean ROC-AUC", f"{mean:.3f}", ", ".join(filter(None, (interval, rows)))))
    if known := {k: v for k, v in figures.get("labels", {}).items() if v.get("roc_auc") is not None}:
        worst = min(known, key=lambda label: float(known[label]["roc_auc"]))
        found.append(("lowest ROC-AUC of a label", f"{known[worst]['roc_auc']:.3f}", worst))
    if (f1 := (figures.get("macro") or {}).get("f1")) is not None:
        found.append(("macro F1", f"{f1:.3f}", "each label at its threshold"))
    if losses := evasion_losses(figures.get("robustness") or {}):
        worst = max(losses, key=lambda evasion: losses[evasion])
        found.append(("largest loss by an evasion", f"{losses[worst]:.3f}", f"{in_words(worst)}, mean ROC-AUC"))
    bpsn = {k: v["bpsn_auc"] for k, v in (figures.get("identities") or {}).items() if v.get("bpsn_auc") is not None}
    if bpsn:
        worst = min(bpsn, key=lambda group: float(bpsn[group]))
        found.append(("lowest BPSN AUC", f"{bpsn[worst]:.3f}", f"harmless comments that mention {in_words(worst)}"))
    return found


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
    if losses := evasion_losses(robustness := found.get("robustness") or {}):
        rows = {in_words(evasion): {"obfuscated": Dot(robustness[evasion]["mean"])} for evasion in losses}
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
            rows[in_words(part)] = known
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


def _as_written(value: object) -> str:
    """As it stands in a settings file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
