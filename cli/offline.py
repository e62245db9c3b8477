"""Scoring without a queue: `moderato score`, and what other commands score with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.policies import deciding_policy
from cli.tables import STDOUT, BadRows, Encoding, Rows, Separator, SkipBadRows, TextColumn, text_column_of
from cli.terminal import Problem, progress, say
from config.names import DEFAULT_COMMUNITY, LABELS, STARTER_VERSION
from config.table_files import Row, Table, open_table, quoted

if TYPE_CHECKING:
    from config.policy import Policy
    from model.engine import Scorer, Scores

ROWS_PER_CHUNK = 512
ADDED_COLUMNS = (*LABELS, "action")
LABELLED_PREFIX = "score_"

Version = Annotated[str, typer.Option(help="Name in the versions directory, or a version's own directory.")]


def score(
    source: Annotated[str, typer.Argument(metavar="IN", help="CSV, JSON lines or Parquet; - is standard input.")],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="Written as IN is, or as its ending says; - is standard output.")
    ],
    text_column: TextColumn = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Of the added columns; by default none, or score_ where IN has one of these columns."),
    ] = None,
    separator: Separator = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    version: Version = STARTER_VERSION,
    policy: Annotated[Path | None, typer.Option(help="Policy file; by default the policy that is active.")] = None,
    community: Annotated[str, typer.Option(help="Whose rules of the policy decide.")] = DEFAULT_COMMUNITY,
) -> None:
    """Add the six scores and the action to every row of a file, here and now, without a queue.

    All columns stay, and all rows but bad ones. A row whose text is empty gets neither scores nor action.

    Example: moderato score comments.csv scored.csv --text-column comment_text

    Example: zcat comments.jsonl.gz | moderato score - - > scored.jsonl
    """
    bad = BadRows(skip_bad_rows)
    rows = 0
    # All of the files is looked at before the model is loaded.
    with open_table(source, bad.form(separator, encoding)) as table:
        column = text_column_of(table, text_column)
        added = added_columns(table.columns, prefix)
        out_rows = Rows(target, table, [*table.columns, *added.values()])
        with out_rows.writing(), progress(f"scoring {table.name}", table.size) as update:
            scorer, rules = _load(version, policy)
            for chunk in _chunks(table, column):
                for row, values in zip(chunk, _judged(chunk, column, scorer, rules, community), strict=True):
                    out_rows.add(row, {added[name]: value for name, value in values.items()})
                rows += len(chunk)
                update(table.bytes_read(), note=f"{rows:,} rows")
    bad.tell()
    say(f"{rows:,} row{'' if rows == 1 else 's'} in {'standard output' if target == STDOUT else target}")


def added_columns(columns: Sequence[str], prefix: str | None) -> dict[str, str]:
    """What the scores' and the action's columns are called in a table that has these columns.

    Raises:
        Problem: the table has one of that name.
    """
    if prefix is None:
        prefix = "" if not set(columns) & set(ADDED_COLUMNS) else LABELLED_PREFIX
        if prefix:
            say(f"there is a column of labels or actions already: the added ones are called {prefix}toxic and so on")
    added = {name: f"{prefix}{name}" for name in ADDED_COLUMNS}
    if taken := [name for name in added.values() if name in columns]:
        raise Problem(f"there is a column {taken[0]!r} already: give the added ones another --prefix")
    return added


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


def _load(version: str, policy: Path | None) -> "tuple[Scorer, Policy]":
    from config.policy import read_policy
    from config.settings import settings
    from model.engine import load_scorer

    rules = read_policy(policy) if policy else deciding_policy()
    worker = settings().worker
    scorer = load_scorer(find_version(version), device=worker.device, engine=worker.engine, threads=worker.threads)
    say(f"version {scorer.version}, {scorer.engine.description}")
    return scorer, rules


def _chunks(table: Table, column: str) -> Iterator[list[Row]]:
    """Rows whose texts can be scored, or are empty."""
    chunk = []
    for row in table:
        text = row.values.get(column)
        if not isinstance(text, str | None):
            table.refuse(row, f"{quoted(column)} is not a text")
        elif text and not _is_unicode(text):
            table.refuse(row, f"{quoted(column)} holds a lone surrogate, which is no Unicode text")
        else:
            chunk.append(row)
        if len(chunk) == ROWS_PER_CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _judged(
    rows: Sequence[Row], column: str, scorer: "Scorer", policy: "Policy", community: str
) -> Iterator[dict[str, str | float | None]]:
    """The scores and the action of each row's text."""
    from model.text import is_truncated

    texts = [row.values.get(column) or "" for row in rows]
    scores = iter(scorer.score_texts([text for text in texts if text.strip()]).tolist())
    for text in texts:
        if text.strip():
            of_row = next(scores)
            action = policy.decide(community, of_row, truncated=is_truncated(text)).action.value
            yield {**dict(zip(LABELS, of_row, strict=True)), "action": action}
        else:
            yield dict.fromkeys(ADDED_COLUMNS)
