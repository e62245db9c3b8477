"""Scoring without a queue: `moderato score`, and what other commands score with."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from cli.policies import deciding_policy
from cli.terminal import Problem, progress, say
from config.names import DEFAULT_COMMUNITY, LABELS, STARTER_VERSION

if TYPE_CHECKING:
    import pandas as pd

    from model.engine import Scorer, Scores
    from model.policy import Policy

ROWS_PER_CHUNK = 512
ADDED_COLUMNS = (*LABELS, "action")

Version = Annotated[str, typer.Option(help="Name in the versions directory, or a version's own directory.")]


def score(
    source: Annotated[Path, typer.Argument(metavar="IN.csv", exists=True, dir_okay=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT.csv", dir_okay=False)],
    text_column: Annotated[str, typer.Option(help="Column that holds the texts.")] = "comment_text",
    version: Version = STARTER_VERSION,
    policy: Annotated[Path | None, typer.Option(help="Policy file; by default the policy that is active.")] = None,
    community: Annotated[str, typer.Option(help="Whose rules of the policy decide.")] = DEFAULT_COMMUNITY,
) -> None:
    """Add the six scores and the action to every row of a CSV, here and now, without a queue.

    All columns and rows stay as they are. A row whose text is empty gets neither scores nor action.

    Example: moderato score comments.csv scored.csv --text-column comment_text
    """
    import pandas as pd

    from config.settings import settings
    from model.engine import load_scorer
    from model.policy import read_policy

    rules = read_policy(policy) if policy else deciding_policy()
    scorer = load_scorer(
        find_version(version),
        device=settings().worker.device,
        engine=settings().worker.engine,
        threads=settings().worker.threads,
    )
    say(f"version {scorer.version}, {scorer.engine.description}")
    rows = 0
    try:
        with (
            warnings.catch_warnings(action="error", category=pd.errors.ParserWarning),
            source.open("rb") as read,
            _written_whole(target) as written,
            progress(f"scoring {source.name}", source.stat().st_size) as update,
        ):
            chunks = pd.read_csv(
                read,
                dtype=str,
                keep_default_na=False,
                encoding="utf-8-sig",
                # Otherwise pandas takes the first column for row names where the first row has too many fields.
                index_col=False,
                chunksize=ROWS_PER_CHUNK,
                compression="gzip" if source.suffix == ".gz" else None,
            )
            for frame in chunks:
                _check_columns(frame, source, text_column)
                _add_scores(frame, text_column, scorer, rules, community).to_csv(
                    written, header=rows == 0, index=False, float_format="%.6f"
                )
                rows += len(frame)
                update(read.tell(), note=f"{rows:,} rows")
    except (ValueError, pd.errors.ParserWarning, OSError) as error:
        raise Problem(f"{source} could not be scored: {error}; {target} was not written") from None
    say(f"{rows:,} rows in {target}")


def score_texts(scorer: "Scorer", texts: Sequence[str]) -> "Scores":
    """Scores of one text or more, (texts, 6), while a bar shows how far it is."""
    import numpy as np

    parts = []
    with progress(f"scoring with {scorer.version}", len(texts)) as update:
        for start in range(0, len(texts), ROWS_PER_CHUNK):
            parts.append(scorer.score_texts(texts[start : start + ROWS_PER_CHUNK]))
            update(min(start + ROWS_PER_CHUNK, len(texts)))
    return np.concatenate(parts)


def find_version(name: str) -> Path:
    """The directory of a version given by name, or by its path.

    Raises:
        VersionError: there is none.
    """
    from config.settings import settings
    from model.version import MANIFEST_FILE, version_directory

    directory = Path(name)
    return directory if (directory / MANIFEST_FILE).is_file() else version_directory(name, settings().versions_dir)


def _check_columns(frame: "pd.DataFrame", source: Path, text_column: str) -> None:
    if text_column not in frame:
        columns = ", ".join(map(str, frame.columns))
        raise Problem(f"{source} has no column {text_column!r}; it has {columns}. Name it with --text-column")
    if taken := [column for column in ADDED_COLUMNS if column in frame]:
        raise Problem(f"{source} has a column {taken[0]!r} already, which would be overwritten; rename it first")


def _add_scores(
    frame: "pd.DataFrame", text_column: str, scorer: "Scorer", policy: "Policy", community: str
) -> "pd.DataFrame":
    with_text = frame[text_column].str.strip() != ""
    scores = scorer.score_texts(frame.loc[with_text, text_column].tolist())
    for column, label in enumerate(LABELS):
        frame.loc[with_text, label] = scores[:, column]
    frame.loc[with_text, "action"] = [policy.decide(community, row).action.value for row in scores.tolist()]
    return frame


@contextmanager
def _written_whole(target: Path) -> Iterator[IO[str]]:
    """A file that takes its name when it is complete, and is gone where that never comes."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
