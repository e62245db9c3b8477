"""Commands on trials: a second version beside the active one, watched, compared, promoted or stopped."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cli.terminal import Problem, out, print_json, say, shorten, shown, user
from cli.versions import VersionName, register_from_disk

if TYPE_CHECKING:
    from db.trials import Kind, ReviewedSide, ShadowComparison, Side, TrialRow
    from model.trial import Judgement, Shift

canary = typer.Typer(
    help="Let a version decide a small share, and roll it back by itself when it leaves its bounds.",
    no_args_is_help=True,
)
shadow = typer.Typer(help="Score beside the active version without acting on it, and compare.", no_args_is_help=True)
ab = typer.Typer(help="Let two versions decide, and compare what reviewers make of it.", no_args_is_help=True)

OnTrial = Annotated[str | None, typer.Argument(help="Promote only if this version is the one on trial.")]
Share = Annotated[float, typer.Option(min=0.01, max=100, help="Of the submissions, in percent.")]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]
Force = Annotated[bool, typer.Option("--force", help="Also where the gate refused it.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


# --- Canary ------------------------------------------------------------------------------------------------------


@canary.command("start")
def start_canary(version: VersionName, share: Share = 5.0, reason: Reason = "by hand", force: Force = False) -> None:
    """Let a version decide a share of the submissions; the section `trial` of the settings bounds it.

    Example: moderato canary start v20261122-160501-1f2e3d4c --share 5
    """
    _start("canary", version, share, reason, force)


@canary.command("status")
def canary_status(as_json: AsJson = False) -> None:
    """Show how the newest canary does beside the active version, and how far it may differ.

    Example: moderato canary status
    """
    from api_client.client import ModerationClient
    from config.settings import TrialSettings
    from model.trial import judge

    with ModerationClient() as client:
        trial, candidate, baseline = client.trial_sides("canary")
    bounds = TrialSettings(**trial.bounds)
    judgement = judge(candidate, baseline, bounds)
    tried = candidate.decisions + candidate.errors
    share = tried / (candidate.decisions + baseline.decisions) if candidate.decisions + baseline.decisions else None
    if as_json:
        print_json(
            {
                "trial": trial,
                "actual_share": share,
                "candidate": candidate,
                "active": baseline,
                "error_rate": candidate.errors / tried if tried else None,
                "shifts": [_shift_json(shift) for shift in judgement.shifts],
                "missing_decisions": judgement.missing,
                "out_of_bounds": judgement.rolls_back,
                "judgement": judgement.reason,
            }
        )
        return
    _print_trial(trial)
    actual = "nothing is decided yet" if share is None else f"{share:.1%} of what was decided went to it"
    out.print(Text(f"{trial.share:.1%} of the submissions asked for, {actual}"))
    if tried:
        rate = f"{candidate.errors / tried:.1%}"
        out.print(
            Text(f"{candidate.errors:,} of {tried:,} it failed to score ({rate}, {bounds.max_error_rate:.1%} allowed)")
        )
    out.print(_sides_table(candidate, baseline, judgement))
    if trial.outcome is None:
        out.print(Text(judgement.reason))


@canary.command("promote")
def promote_canary(version: OnTrial = None, reason: Reason = "the canary did well") -> None:
    """Make the canary's version the active one.

    Example: moderato canary promote v20261122-160501-1f2e3d4c
    """
    _promote("canary", version, reason)


@canary.command("stop")
def stop_canary(reason: Reason = "by hand") -> None:
    """End the canary; the active version decides everything again.

    Example: moderato canary stop --reason "enough seen"
    """
    _stop("canary", reason)


# --- Shadow ------------------------------------------------------------------------------------------------------


@shadow.command("start")
def start_shadow(version: VersionName, share: Share = 100.0, reason: Reason = "by hand", force: Force = False) -> None:
    """Score a share of the submissions with a second version, when the engine has time. Nothing is done by it.

    Example: moderato shadow start v20261122-160501-1f2e3d4c
    """
    _start("shadow", version, share, reason, force)


@shadow.command("compare")
def compare_shadow(
    limit: Annotated[int, typer.Option(min=0, max=1000, help="Of the comments that differ most.")] = 10,
    with_text: Annotated[bool, typer.Option("--text", help="Show the comments' texts too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which actions would have been others, how far the scores are apart, and where most.

    Example: moderato shadow compare --limit 20 --text
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        trial, found = client.shadow_comparison(limit=limit)
    if as_json:
        rows = [asdict(each) for each in found.differences]
        for row in rows:
            if not with_text:
                del row["text"]
        print_json({"trial": trial, **asdict(found), "changed": found.changed, "differences": rows})
        return
    _print_trial(trial)
    out.print(Text(f"{found.compared:,} submissions compared; {found.errors:,} it failed to score"))
    if not found.compared:
        return
    out.print(Text(f"{found.changed:,} actions would have been others ({found.changed / found.compared:.1%})"))
    out.print(_actions_table(found))
    apart = ", ".join(f"{label} {difference:.4f}" for label, difference in found.mean_differences.items())
    out.print(Text(f"mean absolute difference: {apart}"))
    table = Table("differs by", "submission", "action", "shadow's action", *(["text"] if with_text else []))
    for each in found.differences:
        text = [Text(shorten(each.text))] if with_text else []
        table.add_row(f"{each.most:.4f}", Text(each.submission_id), each.action, each.shadow_action, *text)
    out.print(table)


@shadow.command("stop")
def stop_shadow(reason: Reason = "by hand") -> None:
    """End the shadow; what it scored stays.

    Example: moderato shadow stop
    """
    _stop("shadow", reason)


# --- A/B ---------------------------------------------------------------------------------------------------------


@ab.command("start")
def start_ab(version: VersionName, share: Share = 50.0, reason: Reason = "by hand", force: Force = False) -> None:
    """Let a second version decide a share of the submissions, whatever comes of it.

    Example: moderato ab start v20261122-160501-1f2e3d4c --share 50
    """
    _start("ab", version, share, reason, force)


@ab.command("compare")
def compare_ab(as_json: AsJson = False) -> None:
    """Show how many decisions of each version reviewers overturned, with 95 % intervals.

    Example: moderato ab compare
    """
    from api_client.client import ModerationClient
    from model.trial import wilson_interval

    with ModerationClient() as client:
        trial, *sides = client.trial_reviews("ab")
    intervals = {side.version: wilson_interval(side.overturned, side.reviewed) for side in sides}
    if as_json:
        candidate, baseline = (
            asdict(side) | {"overturned_share": _share(side), "interval_95": intervals[side.version]} for side in sides
        )
        print_json({"trial": trial, "candidate": candidate, "active": baseline})
        return
    _print_trial(trial)
    table = Table("", "version", "decisions", "reviewed", "overturned", "share", "95 % interval")
    for name, side in zip(("candidate", "active"), sides, strict=True):
        low, high = intervals[side.version]
        share = _share(side)
        of_reviewed = ["", ""] if share is None else [f"{share:.1%}", f"{low:.1%} to {high:.1%}"]
        counts = (side.decisions, side.reviewed, side.overturned)
        table.add_row(name, side.version, *(f"{count:,}" for count in counts), *of_reviewed)
    out.print(table)


@ab.command("promote")
def promote_ab(version: OnTrial = None, reason: Reason = "it won the A/B test") -> None:
    """Make the second version the active one.

    Example: moderato ab promote v20261122-160501-1f2e3d4c
    """
    _promote("ab", version, reason)


@ab.command("stop")
def stop_ab(reason: Reason = "by hand") -> None:
    """End the test; the active version decides everything again.

    Example: moderato ab stop
    """
    _stop("ab", reason)


# --- What they share ---------------------------------------------------------------------------------------------


def _start(kind: "Kind", version: str, share: float, reason: str, force: bool) -> None:
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        register_from_disk(client, version)
        trial = client.start_trial(kind, version, share=share / 100, by=user(), reason=reason, force=force)
    does = "scores" if kind == "shadow" else "decides"
    then = "status" if kind == "canary" else "compare"
    say(
        f"{version} {does} {share:g} % of the submissions beside {trial.baseline}, as soon as workers have loaded it; "
        f"`moderato {kind} {then}` shows how it does"
    )


def _promote(kind: "Kind", version: str | None, reason: str) -> None:
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        live = client.live_trial_of(kind)
        if version not in (None, live.version):
            raise Problem(f"nothing was changed: the {kind} that runs is of {live.version}, not of {version}")
        trial = client.promote_trial(live, by=user(), reason=reason)
    say(f"{trial.version} is the active version; `moderato models` shows which worker runs it")


def _stop(kind: "Kind", reason: str) -> None:
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        trial = client.stop_trial(client.live_trial_of(kind), by=user(), reason=reason)
    say(f"the {kind} of {trial.version} is over; {trial.baseline} decides alone")


def _print_trial(trial: "TrialRow") -> None:
    begun = f"since {shown(trial.started_at)} by {trial.started_by}: {trial.reason}"
    out.print(Text(f"{trial.kind} of {trial.version} beside {trial.baseline}, {begun}", "bold"))
    if trial.outcome is not None:
        outcome = trial.outcome.replace("_", " ")
        out.print(Text(f"{outcome} at {shown(trial.ended_at)} by {trial.ended_by}: {trial.verdict}"))


def _sides_table(candidate: "Side", baseline: "Side", judgement: "Judgement") -> Table:
    table = Table("", candidate.version, f"{baseline.version} (active)", "shift", "may differ by")
    table.add_row("decisions", f"{candidate.decisions:,}", f"{baseline.decisions:,}")
    for shift in judgement.shifts:
        figures = (f"{shift.candidate:.4f}", f"{shift.baseline:.4f}", f"{shift.difference:+.4f}")
        style = "red" if shift.is_beyond and not judgement.missing else ""
        name = shift.name if shift.name == "not allowed" else f"mean {shift.name}"
        table.add_row(name, *figures, "" if math.isinf(shift.limit) else f"{shift.limit:.4f}", style=style)
    for action in sorted(candidate.actions.keys() | baseline.actions.keys()):
        of_each = (
            side.actions.get(action, 0) / side.decisions if side.decisions else 0 for side in (candidate, baseline)
        )
        table.add_row(action, *(f"{share:.1%}" for share in of_each))
    return table


def _actions_table(found: "ShadowComparison") -> Table:
    would_be = sorted({action for row in found.actions.values() for action in row})
    table = Table("decided ↓  shadow →", *would_be)
    for decided, row in sorted(found.actions.items()):
        table.add_row(decided, *(f"{row.get(action, 0):,}" for action in would_be))
    return table


def _shift_json(shift: "Shift") -> dict[str, Any]:
    limit = None if math.isinf(shift.limit) else shift.limit  # JSON knows no infinity
    return {
        "name": shift.name,
        "candidate": shift.candidate,
        "active": shift.baseline,
        "difference": shift.difference,
        "may_differ_by": limit,
    }


def _share(side: "ReviewedSide") -> float | None:
    return side.overturned / side.reviewed if side.reviewed else None
