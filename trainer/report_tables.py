"""A version's figures as tables, each left out where they lack it. Owns how a figure reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from config.names import LABELS

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
VALUE = "value"
"""Column of a table of plain facts."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a report. Each row begins with its name; a cell's second line is what is said in small print."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def tables(
    caption: str, facts: Mapping[str, Any], *, name: str = "name", show: Callable[[object], str] | None = None
) -> list[Table]:
    """Any nested facts as tables, those within under their own names.

    Mappings with the same keys become the rows of one table, or its columns where that is narrower.
    """
    show = show or shown
    plain = {key: {VALUE: show(value)} for key, value in facts.items() if not _is_nested(value)}
    found = table_of(caption, name, plain)
    alike: dict[tuple[str, ...], dict[str, Mapping[str, object]]] = {}
    for key, value in facts.items():
        if isinstance(value, list) and _is_nested(value):
            found += table_of(in_words(key), name, dict(_entry(n, entry, show) for n, entry in enumerate(value, 1)))
        elif _is_nested(value) and any(map(_is_nested, value.values())):
            for table in tables(in_words(key), value, name=name, show=show):
                prefix = "" if table.caption == in_words(key) else f"{in_words(key)}: "
                found.append(replace(table, caption=prefix + table.caption))
        elif _is_nested(value):
            alike.setdefault(tuple(value), {})[key] = value
    for keys, group in alike.items():
        rows = {key: {in_words(column): show(value) for column, value in entry.items()} for key, entry in group.items()}
        if len(group) == 1:
            rows = {row: {VALUE: cell} for row, cell in rows.popitem()[1].items()}
        elif len(keys) > len(group):
            rows = {row: {in_words(key): show(entry[row]) for key, entry in group.items()} for row in keys}
        found += table_of(", ".join(map(in_words, group)), name, rows)
    return found


def label_table(figures: Mapping[str, Any]) -> list[Table]:
    """Each label, and their averages."""
    rows = measured_rows(figures.get("labels", {}))
    over_all = {f"{name} average": figures[name] for name in ("micro", "macro") if figures.get(name)}
    if not over_all and figures.get("mean_roc_auc") is not None:
        over_all = {"mean": {"roc_auc": figures["mean_roc_auc"]}}
    return table_of("Each label, and all of them", "label", rows | measured_rows(over_all))


def measured_rows(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """A row for each part: its counts, and its figures with their intervals."""
    rows = {}
    for part, measured in parts.items():
        row = {title: shown(measured[key]) for key, title in COUNTS.items() if key in measured}
        for key, title in PART_METRICS.items():
            if measured.get(key) is not None:
                interval = interval_words((measured.get("intervals") or {}).get(key))
                row[title] = f"{measured[key]:.3f}" + (f"\n{interval}" if interval else "")
        rows[in_words(part)] = row
    return rows


def confusion_tables(figures: Mapping[str, Any]) -> list[Table]:
    """For each label what is flagged at its threshold, and what is not."""
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


def calibration_table(calibration: Mapping[str, Any]) -> list[Table]:
    """What a manifest's `calibration` says of each label."""
    rows = {
        label: {in_words(key).replace("ece", "ECE"): shown(value) for key, value in fitted.items()}
        for label, fitted in calibration.items()
    }
    return table_of("What was fitted to the validation rows: scale × logit + shift", "label", rows)


def threshold_tables(thresholds: Mapping[str, Any]) -> list[Table]:
    """A manifest's advised `thresholds`, by what they aim at."""
    found: list[Table] = []
    for advice, title in ADVICE.items():
        rows = {
            label: {key.replace("f1", "F1"): shown(value) for key, value in each[advice].items()}
            for label, each in thresholds.items()
            if each.get(advice)
        }
        found += table_of(title, "label", rows)
    return found


def identity_table(figures: Mapping[str, Any]) -> list[Table]:
    """The groups of which any figure is known, and their mean."""
    groups = {group: each for group, each in (figures.get("identities") or {}).items() if has_areas(each)}
    rows = measured_rows(groups)
    if rows and (means := figures.get("identity_means")):
        rows |= measured_rows({"generalised mean": means})
    return table_of("Toxic scores where a group is mentioned", "group", rows)


def has_areas(measured: Mapping[str, Any]) -> bool:
    """Whether enough rows mentioned a group to measure anything."""
    return any(measured.get(key) is not None for key in IDENTITY_METRICS)


def robustness_table(robustness: Mapping[str, Any]) -> list[Table]:
    """The same rows as they are, and in each evader's spelling."""
    losses = evasion_losses(robustness)
    rows = {}
    for written in ("plain", *losses) if losses else ():
        areas = {key: f"{area:.3f}" for key, area in robustness[written].items() if area is not None}
        loss = f"{losses[written]:.3f}" if written in losses else ""
        name = in_words(written) if written in losses else "as they are"
        rows[name] = {"mean": areas.pop("mean"), "loss": loss, **areas}
    return table_of(f"ROC-AUC on {robustness['rows']:,} rows", "written", rows) if losses else []


def evasion_losses(robustness: Mapping[str, Any]) -> dict[str, float]:
    """How much mean ROC-AUC each evasion costs."""
    plain = (robustness.get("plain") or {}).get("mean")
    return {
        evasion: plain - measured["mean"]
        for evasion, measured in robustness.items()
        if isinstance(measured, Mapping) and evasion != "plain" and None not in (plain, measured.get("mean"))
    }


def int8_table(metrics: Mapping[str, Any]) -> list[Table]:
    """ROC-AUC of the int8 form beside the weights it was made of."""
    rows = {
        label: {"int8": f"{auc['int8']:.4f}", "torch, fp32": f"{auc['torch']:.4f}"}
        | {"change": f"{auc['int8'] - auc['torch']:+.4f}"}
        for label, auc in (metrics.get("int8") or measured_by_form(metrics))["roc_auc"].items()
        if None not in (auc["int8"], auc["torch"])
    }
    return table_of("ROC-AUC of both forms on the held-out rows", "label", rows)


def measured_by_form(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `trainer.soundness.compare_int8` gives, of a manifest that holds the figures of both forms."""
    int8, fp32 = (metrics.get(form, {}).get("labels", {}) for form in ("holdout_int8", "holdout_fp32"))
    aucs = {
        label: {"torch": fp32[label].get("roc_auc"), "int8": int8[label].get("roc_auc")}
        for label in fp32
        if label in int8
    }
    return {"roc_auc": aucs, "largest_difference": metrics.get("int8_largest_difference")}


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Every number of the gate's verdict."""
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
    return table_of("On the same held-out rows", "figure", rows)


def table_of(caption: str, name: str, rows: Mapping[str, Mapping[str, str]]) -> list[Table]:
    """One table, with the columns that any row has something in; none where there are none."""
    every = dict.fromkeys(column for row in rows.values() for column in row)
    columns = [column for column in every if any(row.get(column) for row in rows.values())]
    if not columns:
        return []
    return [Table(caption, [name, *columns], [[key, *(row.get(c, "") for c in columns)] for key, row in rows.items()])]


def _entry(number: int, entry: Mapping[str, Any], show: Callable[[object], str]) -> tuple[str, dict[str, str]]:
    """A row for an entry of a list, called by its place and by what it says first."""
    (_, first), *others = entry.items()
    return f"{number}. {show(first)}", {in_words(key): show(value) for key, value in others}


def _is_nested(value: object) -> bool:
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(isinstance(entry, Mapping) and entry for entry in entries)


def interval_words(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""


def shown(value: object) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


def in_words(name: str) -> str:
    return name if name in LABELS else name.replace("_", " ")
