"""`moderato dataset`: what a training would learn from, checked and counted before it costs hours."""

from pathlib import Path
from typing import Annotated

import typer

from cli.tables import BadRows, Encoding, Separator, SkipBadRows
from cli.terminal import Problem, print_json, say
from cli.trainer_options import Recipe, TrainerCommand, chosen_settings, forms


class DatasetCommand(TrainerCommand):
    """Takes those settings of the trainer that say which rows it learns from."""

    names = frozenset(
        {
            "train_files",
            "holdout_file",
            "columns",
            "positive_from",
            "max_rows",
            "validation_share",
            "evasion_share",
            "synonym_share",
            "oversample_share",
            "seed",
        }
    )


def dataset(
    ctx: typer.Context,
    config: Recipe = None,
    separator: Separator = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File to write the card to, in place of the terminal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The counts and hashes as one JSON object.")] = False,
) -> None:
    """Check the rows that `moderato train` would take with these options, and describe them in a dataset card.

    Every value is checked, duplicates and texts that are held out too are found, and the card tells what became of
    them. A file that cannot be trained on is refused with its row and column. No comment is shown.

    Example: moderato dataset --train my.csv --holdout my-holdout.csv --output CARD.md
    """
    from trainer.assembly import assemble
    from trainer.dataset import from_corrections
    from trainer.report import render_dataset_card
    from trainer.sources import read_holdout

    chosen = chosen_settings(ctx.obj, config)
    bad = BadRows(skip_bad_rows)
    of_training, of_holdout = forms(chosen, bad.form(separator, encoding))
    card = assemble(chosen, from_corrections([]), read_holdout(chosen, of_holdout), of_training).card
    bad.tell()
    if as_json:
        print_json(card)
        return
    text = render_dataset_card(card)
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Problem(f"{output} cannot be written: {error.strerror}") from None
    for note in card["notes"]:
        say(note)
    say(f"the card is in {output}")
