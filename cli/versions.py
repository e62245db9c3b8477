"""Commands on model versions: which there are, which one decides, and changing it while comments stream."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.comparing import compare
from cli.groups import GroupWithDefault
from cli.pruning import prune
from cli.terminal import confirm, out, print_json, say, shown, user

if TYPE_CHECKING:
    from api_client.client import ModerationClient
    from db.trials import TrialRow


def version_name(version: str) -> str:
    """A version's name, checked while the options are parsed."""
    from model.version import checked_name

    return checked_name(version)


def new_version_name(version: str) -> str:
    """The name of a version that is to be made, checked before hours are spent on it."""
    from config.settings import settings
    from model.version import new_version_directory

    new_version_directory(version, settings().versions_dir)
    return version


VersionName = Annotated[
    str,
    typer.Argument(help="As `moderato models` lists it, or in the versions directory.", callback=version_name),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

MOST_ACTIVATIONS = 1_000
"""Looked back over for a version that was active before."""
MOST_LOADS = 20
"""Workers that `moderato models` lists. One that ended stays in the table, and its successor may have another name."""

app = typer.Typer(cls=GroupWithDefault)
app.command()(compare)
app.command()(prune)


@app.callback()
def models(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """List the model versions, the active one, and which of them each worker loaded; also those in the versions
    directory that are not used yet.

    Example: moderato models
    """
    from api_client.client import ModerationClient
    from config.settings import settings
    from model.pruning import versions_on_disk
    from model.version import was_pruned

    with ModerationClient() as client:
        versions, activations = client.versions(), client.activations(limit=5)
        loads = client.loads(activations[0].activation_id) if activations else []
        trial = client.live_trial()
    active = activations[0].version if activations else None
    versions_dir = settings().versions_dir
    pruned = {row.version for row in versions if was_pruned(row.version, versions_dir)}
    unregistered = sorted(versions_on_disk(versions_dir).keys() - {row.version for row in versions})
    if as_json:
        listed = [
            {
                "version": row.version,
                "parent": row.parent,
                "registered_at": row.registered_at,
                "active": row.version == active,
                "pruned": row.version in pruned,
                "metrics": row.manifest.get("metrics", {}),
            }
            for row in versions
        ]
        print_json(
            {
                "versions": listed,
                "unregistered": unregistered,
                "activations": activations,
                "loads": loads,
                "trial": trial,
            }
        )
        return
    table = Table("", "version", "parent", "registered", "mean ROC-AUC", "held-out rows")
    for row in versions:
        measured = row.manifest.get("metrics", {}).get("holdout_int8", {})
        mean = measured.get("mean_roc_auc")
        table.add_row(
            "active" if row.version == active else "pruned" if row.version in pruned else "",
            row.version,
            row.parent or "",
            shown(row.registered_at),
            "" if mean is None else f"{mean:.4f}",
            f"{measured.get('rows', '')}",
        )
    for name in unregistered:
        table.add_row("not used yet", name)
    out.print(table)
    if unregistered:
        say("`moderato canary start NAME` or `moderato activate NAME` puts a version to use that is not used yet")
    for activation in activations:
        line = f"{shown(activation.activated_at)}  {activation.version} activated by {activation.activated_by}: "
        out.print(Text(line + activation.reason))
    newest = sorted(loads, key=lambda load: load.load_id)[-MOST_LOADS:]
    if earlier := len(loads) - len(newest):
        out.print(Text(f"{earlier:,} workers loaded it earlier; `moderato status` lists those that respond"))
    for load in newest:
        what = (
            f"loaded {load.version}"
            if load.error is None
            else f"refused it, continues with {load.version}: {load.error}"
        )
        out.print(Text(f"{shown(load.loaded_at)}  {load.worker} {what}"))
    if trial is not None:
        out.print(Text(f"{shown(trial.started_at)}  {trial_line(trial)}"))


def activate(
    version: VersionName,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "by hand",
    force: Annotated[bool, typer.Option("--force", help="Also where the gate refused it.")] = False,
    yes: Yes = False,
) -> None:
    """Make a version the active one. Workers load it beside the old one and swap between two batches.

    It asks first if no gate has compared the version with another one, or if it would end a live trial.

    Example: moderato activate v20261122-160501-1f2e3d4c --reason "reviewed by the team"
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        register_from_disk(client, version)
        active = client.active()
        doubts = activation_doubts(client, version)
        if doubts and not yes:
            for doubt in doubts:
                say(doubt)
            confirm(f"Make {version} the active version instead of {active.version if active else 'none'}?")
        client.activate(version, instead_of=active, by=user(), reason=reason, force=force)
    say(f"{version} is the active version; `moderato models` shows which worker runs it")


def rollback(
    to: Annotated[str | None, typer.Option(help="Go back to this version, which was active before.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    yes: Yes = False,
) -> None:
    """Go back to the version that was active before.

    A second rollback must name a version: two people who roll back in the same incident mean the same step.

    Example: moderato rollback --reason "hides too much"

    Example: moderato rollback --to starter-2 --yes
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        active, target = client.rollback_target(to=to)
        if not yes:
            since = f"{shown(active.activated_at)}, by {active.activated_by}: {active.reason}"
            say(f"{active.version} has been active since {since}")
            confirm(f"Go back to {target}?")
        client.rollback(instead_of=active, to=to, by=user(), reason=reason)
    say(f"{target} is the active version again")


def activation_doubts(client: "ModerationClient", version: str) -> list[str]:
    """What an operator should know before a version becomes the active one, a sentence each; most often nothing."""
    doubts = []
    before = client.activations(limit=MOST_ACTIVATIONS)
    if before and client.run_that_wrote(version) is None and version not in {row.version for row in before}:
        manifest = next((row.manifest for row in client.versions() if row.version == version), {})
        measured = manifest.get("metrics", {}).get("holdout_int8", {})
        figures = (
            f"its mean ROC-AUC is {measured['mean_roc_auc']:.4f} on {measured['rows']:,} held-out rows"
            if measured.get("mean_roc_auc") is not None
            else "it has no held-out figures"
        )
        doubts.append(f"No gate has compared {version} with the active version; {figures}.")
    trial = client.live_trial()
    if trial is not None and version not in (trial.baseline, trial.version):
        doubts.append(f"This ends the live trial: {trial_line(trial)}.")
    return doubts


def register_from_disk(client: "ModerationClient", version: str) -> None:
    """Verify a version that is on this machine; one that is not known yet, as from `moderato train`, becomes so.

    Raises:
        VersionError: it is here and damaged, it was pruned, or it is neither here nor known.
    """
    from config.settings import settings
    from model.version import VersionError, verify, version_directory, was_pruned

    is_known = version in {row.version for row in client.versions()}
    try:
        directory = version_directory(version, settings().versions_dir)
    except VersionError:
        # What is known need not be on this machine, only on the workers'. One pruned here is gone for them too.
        if is_known and not was_pruned(version, settings().versions_dir):
            return
        raise
    manifest = verify(directory, expected_version=version)
    if not is_known:
        client.register(manifest.model_dump())


def trial_line(trial: "TrialRow") -> str:
    """A live trial in a line."""
    does = "shadows" if trial.kind == "shadow" else "decides"
    return (
        f"{trial.kind}: {trial.version} {does} {100 * trial.share:.4g} % of the submissions beside {trial.baseline}, "
        f"started by {trial.started_by}: {trial.reason}"
    )
