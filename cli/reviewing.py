"""Commands of moderators: correct decisions, be told which to look at first, see how far reviewers agree."""

import shlex
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.groups import GroupWithDefault
from cli.terminal import ACTION_STYLES, Problem, out, print_json, printable, say, shorten, user
from config.names import LABELS, Action

app = typer.Typer(cls=GroupWithDefault)


@app.callback()
def review(
    submission_id: Annotated[str, typer.Argument(help="As `moderato results` shows it.")],
    action: Annotated[Action, typer.Option(help="What should be done with the comment.")],
    label: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=0|1", help="What you say of a label; may be repeated.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="Why.")] = None,
    reviewer: Annotated[str | None, typer.Option(help="Who says so; by default you.")] = None,
) -> None:
    """Confirm or overturn a decision. It holds at once, and the next retrain learns from it.

    Example: moderato review 5f0c…:0 --action hide --label toxic=1 --label threat=0 --note "a personal attack"
    """
    labels = dict(_label(said) for said in label or [])

    from api_client.client import ModerationClient

    with ModerationClient() as client:
        client.review(submission_id, action=action, labels=labels, reviewer=reviewer or user(), note=note)
    say(f"{printable(submission_id)}: {action}")


def _label(said: str) -> tuple[str, int]:
    label, _, value = said.partition("=")
    if label not in LABELS or value not in ("0", "1"):
        raise Problem(f"--label {said} must be LABEL=0 or LABEL=1; the labels are {', '.join(LABELS)}")
    return label, int(value)


@app.command("next")
def review_next(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="Most rows.")] = 10,
    community: Annotated[str | None, typer.Option(help="Only its decisions.")] = None,
    among: Annotated[int, typer.Option(min=1, help="The newest decisions that are looked at.")] = 5_000,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, with scores and whole texts.")] = False,
) -> None:
    """Show the decisions whose review teaches the model most, and why. The comments are shown: they may be abusive.

    First come decisions on which versions disagree, scores near a threshold of the policy, and severe ones. Reviewed
    and erased texts are left out; the same text is shown once. This is not the queue of comments that the policy sends
    to people. That is `moderato results --action review --order oldest --text`.

    Example: moderato review next -n 5 --community news
    """
    from api_client.client import ModerationClient
    from config.policy import PolicyError, parse_policy
    from trainer.active_learning import most_informative

    with ModerationClient() as client:
        decisions, texts = client.unreviewed(community=community, among=among)
    policies = {}
    for version, text in texts.items():
        with suppress(PolicyError):  # of another release: its thresholds then play no part
            policies[version] = parse_policy(text)
    candidates = most_informative(decisions, policies, limit)
    if as_json:
        for each in candidates:
            facts = asdict(each.decision)
            scores = dict(zip(LABELS, facts.pop("scores"), strict=True))
            print_json(facts | scores | {"informativeness": each.informativeness, "reasons": each.reasons})
        return
    if not candidates:
        say(f"none of the newest {among:,} decisions needs a review; --among looks at more")
        return
    table = Table(expand=True)
    table.add_column("submission", overflow="fold")  # never shortened: the review needs it
    table.add_column("action")
    table.add_column("why", ratio=2)
    table.add_column("comment", ratio=3)
    for each in candidates:
        table.add_row(
            Text(printable(each.decision.submission_id)),
            Text(each.decision.action, ACTION_STYLES[each.decision.action]),
            Text("; ".join(each.reasons) or "not reviewed yet"),
            Text(shorten(each.decision.text, 200)),
        )
    out.print(table)
    example = shlex.quote(printable(candidates[0].decision.submission_id))
    say("submit a review, for example:")
    say(f"moderato review {example} --action hide --label insult=1 --label threat=0")


@app.command("agreement")
def agreement(as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False) -> None:
    """Show how far reviewers agree with each other, and what weight their words have in the next retrain.

    The one who is contradicted most comes first. Agreement is over the words on labels of texts that others reviewed
    too; the weight also counts whom they disagree with. A newcomer's is 1, and at 0 nothing is learnt from them.

    Example: moderato review agreement
    """
    from api_client.client import ModerationClient
    from trainer.agreement import compare_reviewers

    with ModerationClient() as client:
        reviewers = sorted(compare_reviewers(client.judged_texts()), key=lambda each: (each.weight, each.name))
    if as_json:
        for each in reviewers:
            print_json({**asdict(each), "weight": each.weight})
        return
    if not reviewers:
        say("no reviews yet")
        return
    table = Table("reviewer", "texts", "compared", "agreement", "weight")
    for each in reviewers:
        table.add_row(
            Text(shorten(each.name, 40)),
            f"{each.texts:,}",
            f"{each.compared:,}",
            f"{each.agreed / each.compared:.1%}" if each.compared else "",
            f"{each.weight:.2f}",
            style="" if each.weight else "red",
        )
    out.print(table)
