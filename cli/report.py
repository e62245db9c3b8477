"""`moderato report`: what a version is and why it may be trusted, on one page that opens without a network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.terminal import Problem, progress, say

if TYPE_CHECKING:
    from model.version import Manifest
    from trainer.report import Measured


OUR_TITLE = b": report of a moderato version</title>"
HEAD_BYTES = 4_096


def report(
    version: Annotated[str, typer.Argument(help="Name in the versions directory, or a version's own directory.")],
    holdout: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Labelled CSV to measure it on now: adds curves and misses."),
    ] = None,
    output: Annotated[Path, typer.Option(dir_okay=False, help="File to write.")] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is no report of a version.")] = False,
    misses: Annotated[
        int, typer.Option(min=0, max=1000, help="Comments to show of each kind of miss and label, with --holdout.")
    ] = 10,
) -> None:
    """Write a version's report: one HTML page with its figures, and the gate's verdict where the database has one.

    With --holdout the page holds comments, the worst misses, and says so: --misses 0 leaves them out.

    Example: moderato report starter-2 --holdout samples/holdout.csv --output starter-2.html
    """
    from cli.offline import find_version
    from model.version import verify
    from trainer.report import measured_at_training, render_page

    if not force and _is_someone_else_s(output):
        raise Problem(f"{output} is not a report, and would be overwritten: name another --output, or add --force")
    directory = find_version(version)
    manifest = verify(directory)
    facts = manifest.model_dump()
    measured = _measure(directory, holdout, misses) if holdout else measured_at_training(facts)
    verdict, notes = _verdict(manifest)
    page = render_page(directory, facts, measured, verdict=verdict, notes=notes)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise Problem(f"{output} cannot be written: {error.strerror}") from None
    held = ", with comments: keep it where they may be kept" if measured.misses else ""
    say(f"the report of {manifest.version} is in {output}{held}")


def _is_someone_else_s(file: Path) -> bool:
    """Whether a file is there that this command did not write."""
    try:
        with file.open("rb") as opened:
            return OUR_TITLE not in opened.read(HEAD_BYTES)
    except OSError:  # whether it can be written is seen when it is
        return False


def _measure(directory: Path, holdout: Path, most: int) -> "Measured":
    """The version's figures on a file, scored as a worker would."""
    from cli.evaluating import warn_of_training_rows
    from config.settings import settings
    from model.engine import load_scorer
    from trainer.evaluation import evaluate
    from trainer.report import Measured, worst_misses
    from trainer.sources import read_source

    rows = read_source(str(holdout))
    if not len(rows):
        raise Problem(f"{holdout} has no rows")
    chosen = settings().worker
    scorer = load_scorer(directory, device=chosen.device, engine=chosen.engine, threads=chosen.threads)
    warn_of_training_rows(scorer.manifest, holdout.name, rows)
    with progress(f"measuring on {holdout.name}"):
        evaluation = evaluate(scorer, rows, robustness_rows=settings().trainer.robustness_rows)
    thresholds = {label: metrics.threshold for label, metrics in evaluation.labels.items()}
    return Measured(
        figures=evaluation.as_dict(),
        on=f"{holdout.name}, now, on {scorer.engine.description}",
        scores=evaluation.scores,
        truth=evaluation.truth,
        misses=worst_misses(rows.texts, evaluation.scores, evaluation.truth, thresholds=thresholds, most=most),
    )


def _verdict(manifest: "Manifest") -> tuple[dict[str, Any] | None, list[str]]:
    """What the gate said of a version, and what a reader should know where that cannot be told."""
    from api_client.client import ModerationClient
    from db.session import DatabaseProblem

    try:
        with ModerationClient() as client:
            run = client.run_that_wrote(manifest.version)
    except DatabaseProblem as problem:
        say(f"the page goes without a verdict of the gate: {problem}")
        return None, ["Whether a gate judged this version is not told: the database could not be read."]
    if run is None:
        return None, []
    comparisons = ((run.metrics or {}).get("verdict") or {}).get("comparisons")
    return {"state": run.state, "reason": run.reason, "comparisons": comparisons}, []
