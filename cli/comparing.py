"""`moderato models compare`: two versions side by side, and what would change if one decided in place of the other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cli.offline import find_version, score_texts
from cli.policies import deciding_policy
from cli.terminal import ACTION_STYLES, out, print_json, say, shorten
from config.names import LABELS

if TYPE_CHECKING:
    from db.queries import Result
    from model.comparison import DecisionChanges
    from model.engine import Scorer
    from model.version import Manifest

Name = Annotated[str, typer.Argument(help="A version's name, or its directory.")]


def compare(
    a: Name,
    b: Name,
    limit: Annotated[
        int,
        typer.Option(
            "-n", "--limit", min=0, max=100_000, help="Newest stored comments to score; 0 compares figures only."
        ),
    ] = 1_000,
    community: Annotated[str | None, typer.Option(help="Only its comments.")] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Labelled CSV to measure both on, in place of the manifests."),
    ] = None,
    most: Annotated[int, typer.Option(min=0, max=1_000, help="Of the comments that change most.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, without the comments' texts.")] = False,
) -> None:
    """Show two versions side by side, and which decisions would change on the newest stored comments.

    Both score the same comments here and now, and the active policy decides. Comments are shown: they may be abusive.

    Example: moderato models compare starter-2 v20261122-160501-1f2e3d4c -n 500
    """
    from model.version import held_out_figures, verify

    directories = [find_version(name) for name in (a, b)]
    manifests = [verify(directory) for directory in directories]
    comments = _stored_comments(community, limit) if limit else []
    if limit and not comments:
        say("no comment's text is stored there: the figures only are compared")
    scorers = [_load(directory) for directory in directories] if comments or holdout else []
    figures = _measure(scorers, holdout) if holdout else [held_out_figures(manifest.metrics) for manifest in manifests]
    changes = _changes(scorers, comments, most) if comments else None
    facts = [_facts(*both) for both in zip(manifests, directories, strict=True)]
    if as_json:
        first, second = ({**fact, "figures": figure} for fact, figure in zip(facts, figures, strict=True))
        print_json({"a": first, "b": second, "decisions": None if changes is None else _as_json(changes, comments)})
        return
    same_rows = len({figure.get("dataset_sha256") for figure in figures}) == 1
    out.print(_figures_table(facts, figures, same_rows))
    if not same_rows:
        say("measured on different rows, their figures say little of each other; --holdout FILE measures both")
    if changes is not None:
        _show_changes(changes, comments, [fact["version"] for fact in facts])


def _stored_comments(community: str | None, limit: int) -> "list[Result]":
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        stored = (row for row in client.results(community=community) if row.text is not None)
        return list(islice(stored, limit))


def _load(directory: Path) -> "Scorer":
    from config.settings import settings
    from model.engine import load_scorer

    worker = settings().worker
    scorer = load_scorer(directory, device=worker.device, engine=worker.engine, threads=worker.threads)
    say(f"version {scorer.version}, {scorer.engine.description}")
    return scorer


def _measure(scorers: "Sequence[Scorer]", file: Path) -> list[dict[str, Any]]:
    from cli.evaluating import warn_of_training_rows
    from trainer.dataset import read_csv
    from trainer.evaluation import measure

    rows = read_csv(file)
    for scorer in scorers:
        warn_of_training_rows(scorer.manifest, file.name, rows)
    return [measure(score_texts(scorer, rows.texts), rows).as_dict() for scorer in scorers]


def _facts(manifest: "Manifest", directory: Path) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "parent": manifest.parent,
        "created_at": manifest.created_at,
        "bytes": sum((directory / file).stat().st_size for file in manifest.files),
    }


def _changes(scorers: "Sequence[Scorer]", comments: "Sequence[Result]", most: int) -> "DecisionChanges":
    import numpy as np

    from model.comparison import compare_decisions
    from model.text import is_truncated

    policy = deciding_policy()
    # The same text has the same scores, and comes often.
    place = {text: index for index, text in enumerate(dict.fromkeys(row.text for row in comments))}
    rows = np.array([place[row.text] for row in comments])
    before, after = (score_texts(scorer, [text or "" for text in place])[rows] for scorer in scorers)
    communities, truncated = [row.community for row in comments], [is_truncated(row.text or "") for row in comments]
    return compare_decisions(communities, before, after, policy, truncated=truncated, most=most)


def _as_json(changes: "DecisionChanges", comments: "Sequence[Result]") -> dict[str, Any]:
    def named(change: Mapping[str, Any]) -> dict[str, Any]:
        return {"submission_id": comments[change["index"]].submission_id, **change}

    facts = asdict(changes) | {"changed": changes.changed}
    facts["growth"] = [{**asdict(each), "relative": each.relative} for each in changes.growth]
    facts["largest"] = {label: named(change) for label, change in facts["largest"].items()}
    facts["most_changed"] = [named(change) for change in facts["most_changed"]]
    return facts


def _figures_table(facts: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], same_rows: bool) -> Table:
    table = Table("", *(fact["version"] for fact in facts), "difference")
    table.add_row("parent", *(Text(fact["parent"] or "") for fact in facts))
    table.add_row("made", *(Text(fact["created_at"]) for fact in facts))
    table.add_row("MB", *(f"{fact['bytes'] / 1e6:.1f}" for fact in facts))
    table.add_row("measured on rows", *(f"{each['rows']:,}" if each else "" for each in figures))
    table.add_section()
    for label in LABELS:
        of_label = [each.get("labels", {}).get(label, {}) for each in figures]
        values = [each.get("roc_auc") for each in of_label]
        intervals = [(each.get("intervals") or {}).get("roc_auc") for each in of_label]
        table.add_row(f"ROC-AUC {label}", *_side_by_side(values, intervals, same_rows))
    means = [each.get("mean_roc_auc") for each in figures]
    intervals = [each.get("mean_roc_auc_interval") for each in figures]
    table.add_row("mean ROC-AUC", *_side_by_side(means, intervals, same_rows))
    return table


def _side_by_side(
    values: Sequence[float | None], intervals: Sequence[Sequence[float] | None], same_rows: bool
) -> list[str]:
    """Two figures with their intervals where they have one, and how far the second is above the first."""
    cells = [
        "" if value is None else f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
        for value, interval in zip(values, intervals, strict=True)
    ]
    first, second = values
    return [*cells, f"{second - first:+.4f}" if same_rows and first is not None and second is not None else ""]


def _show_changes(changes: "DecisionChanges", comments: "Sequence[Result]", versions: Sequence[str]) -> None:
    share = f"{changes.changed / changes.compared:.1%}"
    of_all = f"of the newest {changes.compared:,} stored comments ({share})"
    out.print(Text(f"{changes.changed:,} {of_all} would be decided otherwise"))
    taken = [each.action for each in changes.growth if each.after]
    table = Table(f"{versions[0]} ↓  {versions[1]} →", *taken)
    for action, row in changes.actions.items():
        table.add_row(action, *(f"{row.get(other, 0):,}" for other in taken))
    out.print(table)

    table = Table("action", *versions, "change", "relative")
    for each in changes.growth:
        shares = (f"{count:,} ({count / changes.compared:.1%})" for count in (each.before, each.after))
        relative = "" if each.relative is None else f"{each.relative:+.1%}"
        table.add_row(
            Text(each.action, ACTION_STYLES[each.action]), *shares, f"{each.after - each.before:+,}", relative
        )
    out.print(table)

    table = Table("label", "mean difference", "largest", "submission")
    for label, change in changes.largest.items():
        submission = Text(comments[change.index].submission_id)
        scores = f"{change.score_before:.2f} → {change.score_after:.2f}"
        table.add_row(label, f"{changes.mean_differences[label]:.4f}", scores, submission)
    out.print(table)

    table = Table("action", "moved most", "comment")
    for change in changes.most_changed:
        table.add_row(
            f"{change.before} → {change.after}" if change.before != change.after else change.before,
            f"{change.label} {change.score_before:.2f} → {change.score_after:.2f}",
            Text(shorten(comments[change.index].text)),
        )
    if changes.most_changed:
        out.print(table)
