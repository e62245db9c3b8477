"""`moderato policy`: see, try out and change the policy that decides, for all workers and without a restart."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.terminal import ACTION_STYLES, Problem, confirm, out, print_json, progress, say, shorten, shown, user
from cli.times import past
from config.names import LABELS, Action

if TYPE_CHECKING:
    from api_client.client import ModerationClient
    from config.policy import Policy, Verdict
    from db.policies import PolicyActivationRow
    from model.replay import Matrix, Replay, RuleChange

app = typer.Typer(help="See, try out and change the policy that decides.", no_args_is_help=True)

ACTIVE = "active"
HASH_CHARS = 12
"""Of a policy's hash, where people read it."""
FOLLOW_S = 10.0
"""In which every worker that answers follows: a broadcast, or the next of its looks."""
LISTED_COMMUNITIES = 20

Name = Annotated[str, typer.Argument(metavar="POLICY", help="A file, the first digits of a stored hash, or `active`.")]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]
By = Annotated[str | None, typer.Option(help="Who says so; by default you.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command()
def show(
    name: Name = ACTIVE,
    text: Annotated[bool, typer.Option("--text", help="Only its text, as it was stored.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a policy: the active one, since when and by whom it is, and which workers decide by it.

    Example: moderato policy show

    Example: moderato policy show --text > policy.yaml
    """
    from api_client.client import ModerationClient
    from config.policy import PolicyError, parse_policy

    with ModerationClient() as client:
        found = find_text(client, name)
        if text:
            print(found, end="")
            return
        active, activity = client.active_policy(), client.activity()
    version = hashlib.sha256(found.encode()).hexdigest()
    activation = active if active is not None and active.policy_version == version else None
    communities, error = None, None
    try:
        communities = parse_policy(found).communities
    except PolicyError as cause:  # of a newer release
        error = str(cause)
    if as_json:
        workers = {
            node: {"policy_version": stats.policy_version, "refusal": stats.policy_refusal}
            for node, stats in activity.pipelines.items()
        }
        facts = {"policy_version": version, "communities": communities, "error": error, "text": found}
        print_json(facts | {"activation": activation, "workers": workers})
        return
    out.print(Text(f"policy       {version}"))
    if communities is not None:
        out.print(Text(f"communities  {_listed(communities)}"))
    else:
        out.print(Text(f"             cannot be read by this release: {error}", "red"), soft_wrap=True)
    if activation is not None:
        since = f"since {shown(activation.activated_at)}, by {activation.activated_by}: {activation.reason}"
        out.print(Text(f"active       {since}"), soft_wrap=True)
    for problem in activity.problems:
        say(f"moderato: {problem}")
    for node, stats in activity.pipelines.items():
        out.print(Text(f"worker       {worker_line(node, stats.policy_version, stats.policy_refusal)}"), soft_wrap=True)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Check a policy file. An error names its place, and the exit status is 1; what may be a mistake is a warning.

    Where a database is there, communities that never submitted a comment are named too.

    Example: moderato policy check policy.yaml
    """
    from config.policy import read_policy

    policy = read_policy(file)
    warnings = [*_labels_without_rules(policy), *_unknown_communities(policy)]
    if as_json:
        print_json({"policy_version": policy.version, "communities": policy.communities, "warnings": warnings})
        return
    for warning in warnings:
        say(f"warning: {warning}")
    names = f"{len(policy.communities)} communities" if len(policy.communities) > 1 else "1 community"
    out.print(Text(f"{file} is a policy: {policy.version[:HASH_CHARS]}, {names}"))


@app.command()
def diff(a: Name, b: Name, as_json: AsJson = False) -> None:
    """Show which rules differ between two policies, by community and label, inherited ones included.

    Example: moderato policy diff active policy.yaml
    """
    from api_client.client import ModerationClient
    from model.replay import rule_changes

    with ModerationClient() as client:
        before, after = find_policy(client, a), find_policy(client, b)
    changes = rule_changes(before, after)
    if as_json:
        print_json({"a": before.version, "b": after.version, "changes": [asdict(change) for change in changes]})
    else:
        _show_rule_changes(changes, a, b)


@app.command()
def replay(
    name: Name,
    since: Annotated[str, typer.Option(help="How far back: 24h, 7d, 4w, a time as 2026-11-23T12:00, or `all`.")] = "7d",
    community: Annotated[str | None, typer.Option(help="Only its decisions.")] = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, max=1_000, help="Of each change.")] = 3,
    texts: Annotated[bool, typer.Option("--texts", help="Show the examples' comments. They may be abusive.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what would have been decided if this policy had been there, from the stored scores: no model is needed.

    Compared with what was done then, by whichever policy was there, before reviews. Nothing is changed.

    Example: moderato policy replay policy.yaml --since 7d --examples 5
    """
    begin = None if since == "all" else past(since)

    from api_client.client import ModerationClient
    from model.replay import Replay

    with ModerationClient() as client:
        policy = find_policy(client, name)
        found = Replay(policy, examples)
        done = 0
        with progress("replaying", client.count_scored(since=begin, community=community)) as update:
            for rows in client.scored(since=begin, community=community):
                found.add(rows)
                update(done := done + len(rows))
        comments = _texts(client, found) if texts else {}
    if as_json:
        print_json(_replay_json(found, policy, begin, comments))
    elif not done:
        say("nothing was decided in that time")
    else:
        _show_replay(found, comments if texts else None)


@app.command()
def activate(
    name: Name,
    by: By = None,
    reason: Reason = "by hand",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Make a policy the active one: all workers decide by it within seconds, from one batch to the next.

    What was decided stays as it is, and so does what people said of it.

    Example: moderato policy activate policy.yaml --reason "fewer insults in the news"
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        policy, active = find_policy(client, name), client.active_policy()
        if active is not None and active.policy_version == policy.version:
            say(f"policy {policy.version[:HASH_CHARS]} is the active one already; nothing was changed")
            return
        _show_differences(client, ACTIVE, name)
        if not yes:
            confirm("Decide by this policy from now on?")
        # Only if `active`, from which the differences were shown, is still the active one.
        client.activate_policy(policy.text, instead_of=active, by=by or user(), reason=reason)
        _say_who_follows(client, policy.version)


@app.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="Go back to this policy: the first digits of its hash.")] = None,
    by: By = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Go back to the policy that was active before; from the first one to the file's that decided before it.

    A second rollback must name a policy: two people who roll back in the same incident mean the same step.

    Example: moderato policy rollback --reason "hides too much"
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        active, target = client.rollback_policy_target(to=to)
        if not yes:
            say(f"now {_activation(active)}")
            _show_differences(client, ACTIVE, target[:HASH_CHARS])
            confirm(f"Go back to policy {target[:HASH_CHARS]}?")
        client.rollback_policy(instead_of=active, to=target, by=by or user(), reason=reason)
        _say_who_follows(client, target)


@app.command()
def history(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="Most rows.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """Show which policies were activated, the newest first: when, by whom and why.

    Example: moderato policy history
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        activations = client.policy_activations(limit=limit)
    if as_json:
        for row in activations:
            print_json(row)
        return
    if not activations:
        say("no policy was ever activated: each worker decides by its own policy file")
        return
    table = Table("activated", "policy", "by", "reason")
    for row in activations:
        policy = row.policy_version[:HASH_CHARS]
        table.add_row(shown(row.activated_at), policy, Text(row.activated_by), Text(row.reason))
    out.print(table)


# --- What other commands use too ---------------------------------------------------------------------------------


def find_policy(client: "ModerationClient", name: str) -> "Policy":
    """A policy by the name that people give it; where none is active, `active` is that of the policy file.

    Raises:
        Problem: the name is none of a policy.
        PolicyError: it cannot be read, or is one that this release does not understand.
    """
    from config.policy import PolicyError, parse_policy

    text = find_text(client, name)
    try:
        return parse_policy(text)
    except PolicyError as error:
        raise PolicyError(f"policy {name}: {error}") from None


def find_text(client: "ModerationClient", name: str) -> str:
    """The text of a policy by its name; of a stored one whether this release understands it or not.

    Raises:
        Problem: the name is none of a policy.
        PolicyError: it is a file that cannot be read.
    """
    from config.policy import read_policy
    from config.settings import settings
    from db.policies import NoSuchPolicy

    if name == ACTIVE:
        active = client.active_policy()
        if active is not None:
            return client.policy(active.policy_version)[1]
        file = settings().policy_file
        say(f"no policy was ever activated: each worker decides by its own policy file, which here is {file}")
        return read_policy(file).text
    if Path(name).is_file():
        return read_policy(Path(name)).text
    try:
        return client.policy(name)[1]
    except NoSuchPolicy as error:
        raise Problem(f"{name} is neither a file nor `{ACTIVE}`, and {error}") from None


def deciding_policy() -> "Policy":
    """The active policy; where there is none, or no database to ask, that of the policy file, which is said."""
    from api_client.client import ModerationClient
    from config.policy import read_policy
    from config.settings import settings
    from db.session import DatabaseProblem

    if database_is_there():
        try:
            with ModerationClient() as client:
                return find_policy(client, ACTIVE)
        except DatabaseProblem as problem:
            say(f"moderato: {problem}")
    file = settings().policy_file
    say(f"no database says which policy is active: {file} decides")
    return read_policy(file)


def database_is_there() -> bool:
    """Whether one can be asked: SQLite would make a new file where there is none."""
    from config.settings import settings
    from db.session import lacks_file

    return not lacks_file(settings().database_url)


def worker_line(node: str, policy_version: str | None, refusal: str | None) -> str:
    """By which policy a worker decides, in a line."""
    decides = "does not say how it decides" if policy_version is None else f"decides by {policy_version[:HASH_CHARS]}"
    return f"{node} {decides}{f': {refusal}' if refusal else ''}"


# --- Checking ----------------------------------------------------------------------------------------------------


def _labels_without_rules(policy: "Policy") -> list[str]:
    named = {label for community in policy.communities for label, rules in policy.rules(community).items() if rules}
    return [f"no rule names {label}: nothing ever follows from its score" for label in LABELS if label not in named]


def _unknown_communities(policy: "Policy") -> list[str]:
    from api_client.client import ModerationClient
    from config.names import DEFAULT_COMMUNITY
    from db.session import DatabaseProblem

    if not database_is_there():
        return []
    # One that others inherit from may be there for their sake alone.
    names = [name for name in policy.communities if name != DEFAULT_COMMUNITY and name not in policy.bases]
    try:
        with ModerationClient() as client:
            known = client.known_communities(names)
    except DatabaseProblem as problem:
        return [f"the communities were not looked for: {problem}"]
    return [f"community {name!r} never submitted a comment; is it spelt so?" for name in names if name not in known]


# --- Differences -------------------------------------------------------------------------------------------------


def _show_differences(client: "ModerationClient", before: str, after: str) -> None:
    from config.policy import PolicyError
    from model.replay import rule_changes

    try:
        _show_rule_changes(rule_changes(find_policy(client, before), find_policy(client, after)), before, after)
    except PolicyError as error:  # of a newer release, say: its replacement need not wait for that
        say(f"cannot show what differs: {error}")


def _show_rule_changes(changes: "list[RuleChange]", before: str, after: str) -> None:
    if not changes:
        out.print(Text("no rule differs"))
        return
    table = Table("community", "label", escape(before), escape(after))
    for change in changes:
        thresholds = (_thresholds(rules) for rules in (change.before, change.after))
        table.add_row(Text(_listed(change.communities)), change.label, *thresholds)
    out.print(table)


def _thresholds(rules: "Mapping[Action, float]") -> str:
    return ", ".join(f"{action} {at:g}" for action, at in rules.items()) or "nothing"


def _listed(names: list[str]) -> str:
    some = ", ".join(shorten(name, 40) for name in names[:LISTED_COMMUNITIES])
    return some + (f" and {len(names) - LISTED_COMMUNITIES:,} more" if len(names) > LISTED_COMMUNITIES else "")


# --- Replay ------------------------------------------------------------------------------------------------------


def _texts(client: "ModerationClient", found: "Replay") -> dict[str, str | None]:
    ids = [example.submission_id for kept in found.examples.values() for example in kept]
    rows = (client.result(submission_id) for submission_id in ids)
    return {row.submission_id: row.text for row in rows if row is not None}


def _replay_json(
    found: "Replay", policy: "Policy", since: datetime | None, comments: Mapping[str, str | None]
) -> dict[str, Any]:
    from model.replay import changed, total

    def example(facts: dict[str, Any]) -> dict[str, Any]:
        known = comments.get(facts["submission_id"])
        return facts if known is None else facts | {"text": known}

    return {
        "policy_version": policy.version,
        "since": since,
        "decisions": total(found.matrix),
        "changed": changed(found.matrix),
        "decided_by": dict(found.decided_by),
        "actions": found.matrix,
        "communities": found.by_community,
        "examples": [
            {"from": before, "to": after, "examples": [example(asdict(each)) for each in kept]}
            for (before, after), kept in found.examples.items()
        ],
    }


def _show_replay(found: "Replay", comments: Mapping[str, str | None] | None) -> None:
    from model.replay import changed, total

    of_all, others = total(found.matrix), changed(found.matrix)
    out.print(Text(f"{others:,} of {of_all:,} decisions ({others / of_all:.2%}) would be others"))
    if len(found.decided_by) > 1:
        by = ", ".join(f"{count:,} by {version[:HASH_CHARS]}" for version, count in found.decided_by.most_common(5))
        out.print(Text(f"they were made by {len(found.decided_by)} policies: {by}"))
    out.print(_matrix_table(found.matrix))
    if len(communities := found.by_community) > 1:
        table = Table("community", "decisions", "would be others", "share")
        for name, matrix in list(communities.items())[:LISTED_COMMUNITIES]:
            count, moved = total(matrix), changed(matrix)
            table.add_row(Text(shorten(name, 40)), f"{count:,}", f"{moved:,}", f"{moved / count:.2%}")
        out.print(table)
        if len(communities) > LISTED_COMMUNITIES:
            say(f"{len(communities) - LISTED_COMMUNITIES:,} more communities: --json lists all")
    if any(found.examples.values()):
        out.print(_examples_table(found, comments))


def _matrix_table(matrix: "Matrix") -> Table:
    would_be = [action for action in Action if any(action in row for row in matrix.values())]
    table = Table("was ↓  would be →", *would_be)
    for before, row in matrix.items():
        cells = (Text(f"{row.get(after, 0):,}", "" if before != after else "dim") for after in would_be)
        table.add_row(Text(before, ACTION_STYLES[before]), *cells)
    return table


def _examples_table(found: "Replay", comments: Mapping[str, str | None] | None) -> Table:
    table = Table("was", "would be")
    table.add_column("submission", overflow="fold")  # never shortened: a look at it needs it
    for column in ("community", *(["comment"] if comments is not None else [])):
        table.add_column(column)
    for kept in found.examples.values():
        for example in kept:
            rules = (_rule(verdict, example.scores) for verdict in (example.before, example.after))
            cells = [Text(example.submission_id), Text(shorten(example.community, 40))]
            if comments is not None:
                cells.append(Text(shorten(comments.get(example.submission_id))))
            table.add_row(*rules, *cells)
        table.add_section()
    return table


def _rule(verdict: "Verdict", scores: Mapping[str, float]) -> Text:
    """An action, and the score and threshold that it stands on."""
    label = verdict.label
    because = "" if label is None else f": {label} {scores[label]:.3f} from {verdict.threshold:g}"
    return Text(f"{verdict.action}{because}", ACTION_STYLES[verdict.action])


# --- Following ---------------------------------------------------------------------------------------------------


def _activation(row: "PolicyActivationRow") -> str:
    return f"{row.activated_by} activated {row.policy_version[:HASH_CHARS]}: {row.reason}"


def _say_who_follows(client: "ModerationClient", version: str) -> None:
    """Which workers decide by the policy, once all that answer do, or have had the time for it, or it was replaced."""
    say(f"policy {version[:HASH_CHARS]} is the active one")
    deadline = time.monotonic() + FOLLOW_S
    while True:
        activity = client.activity()
        pipelines = activity.pipelines
        if all(stats.policy_version == version for stats in pipelines.values()) or time.monotonic() > deadline:
            break
        active = client.active_policy()
        if active is not None and active.policy_version != version:
            say(f"it no longer is: {_activation(active)}")
            break
    for problem in activity.problems:
        say(f"moderato: {problem}")
    for node, stats in pipelines.items():
        say(worker_line(node, stats.policy_version, stats.policy_refusal))
    if not pipelines:
        say("no worker answers; each takes it when it starts, or looks")
