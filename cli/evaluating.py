"""`moderato evaluate`: how good a version is on labelled comments, and where it is worse."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from cli.offline import Version, find_version, score_texts
from cli.tables import BadRows, Encoding, Separator, SkipBadRows
from cli.terminal import Problem, out, print_json, say, shorten
from config.names import LABELS, STARTER_VERSION

if TYPE_CHECKING:
    from model.version import Manifest
    from trainer.dataset import Dataset
    from trainer.report import Miss

OF_SCORES = {"roc_auc": "ROC-AUC", "average_precision": "average precision", "log_loss": "log loss", "ece": "ECE"}
OF_DECISIONS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
OF_IDENTITIES = {"subgroup_auc": "subgroup AUC", "bpsn_auc": "BPSN AUC", "bnsp_auc": "BNSP AUC"}
TEXT_CHARS = 120


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="CSV, JSON lines, Parquet or -, the Jigsaw challenge's FOLDER/test.csv, or hub:OWNER/NAME[:SPLIT].",
        ),
    ],
    version: Version = STARTER_VERSION,
    engine: Annotated[Literal["auto", "onnx", "torch"], typer.Option(help="onnx is int8 on the CPU.")] = "auto",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS",
            help="What FILE calls comment_text or a label; may be repeated: comment_text=body reads its column body.",
        ),
    ] = None,
    separator: Separator = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    robustness: Annotated[
        bool,
        typer.Option("--robustness", help="Score every row in each evader's spelling too: seven times the work."),
    ] = False,
    misses: Annotated[int, typer.Option(min=0, max=1000, help="Comments to show of each kind of miss and label.")] = 0,
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="Only a policy with the thresholds that suit these rows, as YAML.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, without comments.")] = False,
) -> None:
    """Measure a version on labelled comments: comment_text, and label columns of 0, 1 or blank (unknown).

    In brackets: 95 % intervals, by bootstrap over the rows. Several files are measured as one.

    Example: moderato evaluate samples/holdout.csv --engine torch --misses 3
    """
    from config.settings import settings
    from model.engine import load_scorer
    from trainer.calibration import advised_thresholds, policy_yaml
    from trainer.dataset import concatenate
    from trainer.evaluation import measure, measure_robustness
    from trainer.sources import read_source

    chosen = settings().trainer
    named: dict[Any, str] = {**chosen.columns, **_columns(columns or [])}
    bad = BadRows(skip_bad_rows)
    form = bad.form(separator, encoding)
    parts = [read_source(source, columns=named, positive_from=chosen.positive_from, form=form) for source in sources]
    bad.tell()
    rows = concatenate(parts)
    if not len(rows):
        raise Problem(f"there are no rows in {', '.join(sources)}")
    scorer = load_scorer(find_version(version), engine=engine, threads=settings().worker.threads)
    say(f"version {scorer.version}, {scorer.engine.description}")
    for source, part in zip(sources, parts, strict=True):
        warn_of_training_rows(scorer.manifest, source, part)
    scores = score_texts(scorer, rows.texts)
    if thresholds:
        print(policy_yaml(advised_thresholds(scores, rows.labels, chosen.target_precision)), end="")
        return
    evaluation = measure(scores, rows, thresholds=scorer.manifest.thresholds)
    if robustness:
        say("the same rows in each evader's spelling")
        evaluation = measure_robustness(evaluation, lambda texts: score_texts(scorer, texts), rows)
    if as_json:
        print_json({"version": scorer.version, "engine": scorer.engine.description, **evaluation.as_dict()})
        return
    show_evaluation(evaluation.as_dict())
    if misses:
        from trainer.report import worst_misses

        cuts = {label: metrics.threshold for label, metrics in evaluation.labels.items()}
        _show_misses(worst_misses(rows.texts, scores, rows.labels, thresholds=cuts, most=misses))


def warn_of_training_rows(manifest: "Manifest", source: str, rows: "Dataset") -> None:
    """Say where a version is measured on the very rows that it was trained on."""
    trained_on = {part["sha256"] for part in manifest.dataset.get("sources", [])}
    if rows.sha256 in trained_on:
        say(
            f"warning: version {manifest.version} was trained on the rows of {source}: figures on them say nothing "
            "about other comments"
        )


def show_evaluation(evaluation: Mapping[str, Any]) -> None:
    """A version's figures as tables; `evaluation` as `trainer.evaluation.Evaluation.as_dict` gives it."""
    from trainer.metrics import RESAMPLES

    labels = evaluation["labels"]
    over_all = {"all taken together": evaluation["micro"], "mean": evaluation["macro"]}
    of_scores = Table("label", "positives", "negatives", *OF_SCORES.values())
    for label, metrics in labels.items():
        of_scores.add_row(label, f"{metrics['positives']:,}", f"{metrics['negatives']:,}", *_cells(metrics, OF_SCORES))
    of_scores.add_section()
    for name, metrics in over_all.items():
        of_scores.add_row(name, "", "", *_cells(metrics, OF_SCORES))
    of_decisions = Table("label", "at or above", *OF_DECISIONS.values(), "TP", "FP", "FN", "TN")
    for label, metrics in labels.items():
        counts = [
            f"{metrics['confusion'][kind]:,}" if metrics["confusion"] else "" for kind in ("tp", "fp", "fn", "tn")
        ]
        of_decisions.add_row(label, f"{metrics['threshold']:g}", *_cells(metrics, OF_DECISIONS), *counts)
    of_decisions.add_section()
    for name, metrics in over_all.items():
        of_decisions.add_row(name, "", *_cells(metrics, OF_DECISIONS))
    out.print(of_scores, of_decisions)
    for label, metrics in labels.items():
        if metrics["roc_auc"] is not None and metrics["resamples"] < RESAMPLES:
            skipped = RESAMPLES - metrics["resamples"]
            say(
                f"{label}: {skipped:,} of {RESAMPLES:,} resamples had one class only, and are left out of its intervals"
            )
    _show_slices(evaluation["slices"])
    _show_identities(evaluation["identities"], evaluation["identity_means"])
    if evaluation["robustness"]:
        _show_robustness(evaluation["robustness"])


def _show_slices(slices: Mapping[str, Any]) -> None:
    table = Table("rows that are", "rows", "toxic", "ROC-AUC of toxic", "mean ROC-AUC")
    for name, figures in slices.items():
        cells = _cells(figures, ("roc_auc", "mean_roc_auc"))
        table.add_row(name, f"{figures['rows']:,}", f"{figures['positives']:,}", *cells)
    out.print(table)


def _show_identities(identities: Mapping[str, Any], means: Mapping[str, float | None]) -> None:
    table = Table("rows that mention", "rows", "toxic", *OF_IDENTITIES.values())
    few = []
    for group, figures in identities.items():
        cells = _cells(figures, OF_IDENTITIES)
        if any(cells):
            table.add_row(group, f"{figures['rows']:,}", f"{figures['positives']:,}", *cells)
        else:
            few.append(f"{group} ({figures['rows']:,})")
    table.add_section()
    table.add_row("generalised mean", "", "", *_cells(means, OF_IDENTITIES))
    if table.row_count > 1:
        out.print(table)
    if few:
        say(f"too few rows of a class to say anything: {', '.join(few)}")


def _show_robustness(robustness: Mapping[str, Any]) -> None:
    written = {name: figures for name, figures in robustness.items() if name != "rows"}
    table = Table("written", "mean ROC-AUC", "change", *LABELS, title=f"ROC-AUC on {robustness['rows']:,} rows")
    plain = written["plain"]["mean"]
    for name, figures in written.items():
        change = "" if plain is None or name == "plain" else f"{figures['mean'] - plain:+.4f}"
        table.add_row(name, *_cells(figures, ("mean",)), change, *_cells(figures, LABELS))
    out.print(table)


def _show_misses(misses: "Sequence[Miss]") -> None:
    table = Table("label", "is", "score", "comment")
    for miss in misses:
        said = "positive" if miss.positive else "negative"
        table.add_row(miss.label, said, f"{miss.score:.3f}", Text(shorten(miss.text, TEXT_CHARS)))
    out.print(table)


def _cells(figures: Mapping[str, Any], names: Sequence[str] | Mapping[str, str]) -> list[str]:
    """Each figure, with its interval below it where it has one; empty where there is no figure."""
    of_figures = figures.get("intervals", {})
    cells = []
    for name in names:
        figure, interval = figures.get(name), of_figures.get(name)
        shown = "" if figure is None else f"{figure:.4f}"
        cells.append(f"{shown}\n({interval[0]:.3f}–{interval[1]:.3f})" if interval else shown)
    return cells


def _columns(named: Sequence[str]) -> dict[str, str]:
    columns = {}
    for each in named:
        name, equals, column = each.partition("=")
        if not equals or name not in ("comment_text", *LABELS):
            turned = f": did you mean {column}={name}?" if column in ("comment_text", *LABELS) else ""
            raise Problem(f"--columns {each} must be OURS=THEIRS, where OURS is comment_text or a label{turned}")
        columns[name] = column
    return columns
