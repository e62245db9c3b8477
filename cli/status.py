"""`moderato status`: what runs, what waits, and how fast each worker's pipeline is, once or refreshed in place."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from cli.policies import HASH_CHARS, worker_line
from cli.terminal import out, print_json, print_line, say, shown
from cli.versions import trial_line

if TYPE_CHECKING:
    from api_client.client import ModerationClient
    from api_client.pipeline_stats import PipelineRates, PipelineStats
    from api_client.watching import Activity, Status
    from db.drift import Drift

NAME_COLUMN = 14
"""Where a line's value begins."""
MOST_GONE_WORKERS = 3
"""Workers of the past that are listed."""
BAR_CHARS = 16
"""Of a stage that is busy all of the time. With it a line fits into 80 columns."""


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Refresh queues and workers in place until Ctrl-C.")
    ] = False,
    interval_s: Annotated[float, typer.Option(min=1, help="Seconds between two looks of --watch.")] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, or with --watch one line for each look.")
    ] = False,
) -> None:
    """Show what runs, what waits and which version decides. Exit status 1 if no worker responds.

    A worker's rates are averages since it started; with --watch, those of the last interval. For each stage they show
    the time per comment, the utilisation, and how many comments wait.

    Example: moderato status --json

    Example: moderato status --watch --interval-s 5
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        if watch:
            with suppress(KeyboardInterrupt):
                _watch(client, interval_s, as_json=as_json)
            return
        state = client.status()
    rates = _rates(state)
    if as_json:
        print_json(_json(state, rates) | {"active_version": state.active.version if state.active else None})
    else:
        _print(_status_lines(state, rates))
    for problem in state.problems:
        say(f"moderato: {problem}")
    if state.problems or not state.workers:
        raise typer.Exit(1)


def _watch(client: "ModerationClient", interval_s: float, *, as_json: bool) -> None:
    looks = _looks(client, interval_s)
    if as_json:
        for activity, rates in looks:
            print_json(_json(activity, rates))
            sys.stdout.flush()
    elif not out.is_terminal:
        for activity, rates in looks:
            _print([*_watched_lines(activity, rates), Text()])
    else:
        with Live(console=out, auto_refresh=False) as live:
            for activity, rates in looks:
                live.update(Group(*_watched_lines(activity, rates)), refresh=True)


def _looks(client: "ModerationClient", interval_s: float) -> "Iterator[tuple[Activity, dict[str, PipelineRates]]]":
    last: dict[str, PipelineStats] = {}
    while True:
        looked_at = time.monotonic()
        activity = client.activity()
        yield activity, _rates(activity, last)
        # A worker too busy to answer this time is compared with its last answer the next time.
        last |= activity.pipelines
        time.sleep(max(0, looked_at + interval_s - time.monotonic()))


def _rates(activity: "Activity", last: "Mapping[str, PipelineStats] | None" = None) -> "dict[str, PipelineRates]":
    from api_client.pipeline_stats import pipeline_rates

    return {worker: pipeline_rates(now, (last or {}).get(worker)) for worker, now in activity.pipelines.items()}


def _json(activity: "Activity", rates: "Mapping[str, PipelineRates]") -> dict[str, Any]:
    more = {"queues_without_worker": activity.queues_without_worker}
    return asdict(activity) | more | {"rates": {worker: asdict(rate) for worker, rate in rates.items()}}


def _print(lines: list[Text]) -> None:
    for line in lines:
        print_line(line, NAME_COLUMN)


def _line(name: str, value: str, style: str = "") -> Text:
    return Text(f"{name:<{NAME_COLUMN - 1}} {value}", style)


def _status_lines(state: "Status", rates: "Mapping[str, PipelineRates]") -> list[Text]:
    lines = [_line("broker", state.broker_url), _line("database", state.database_url)]
    lines += _node_lines(state)
    if state.active is not None:
        active = state.active
        by = f"{active.version}, by {active.activated_by} at {shown(active.activated_at)}: {active.reason}"
        lines.append(_line("active", by))
    lines += _load_lines(state)
    lines += _policy_lines(state)
    if state.trial is not None:
        lines.append(_line("trial", trial_line(state.trial)))
    if state.totals is not None:
        totals = state.totals
        actions = ", ".join(f"{action} {count:,}" for action, count in sorted(totals.actions.items()))
        lines.append(_line("decisions", f"{totals.decisions:,}{f' ({actions})' if actions else ''}"))
        pending = f", {_counted(totals.pending, 'durable submission')} in flight" if totals.pending else ""
        counts = f"{_counted(totals.reviews, 'review')}, {_counted(totals.dead_letters, 'dead letter')}"
        lines.append(_line("", f"{counts}{pending}"))
    if state.drift is not None:
        lines += drift_lines(state.drift)
    if state.last_run is not None:
        run = state.last_run
        step = f", step {run.step} of {run.total_steps}" if run.state == "running" and run.step else ""
        phase = run.phase if run.state == "running" else ""
        lines.append(_line("last training", f"{run.state} {phase}{step}".strip()))
        if run.reason:
            lines.append(_line("", run.reason))
    return lines + _pipeline_lines(state, rates)


def _load_lines(state: "Status") -> list[Text]:
    """Which version each worker runs; of those that do not respond, the newest few and what they ran last."""
    lines = []
    for load in (load for load in state.loads if load.worker in state.workers):
        refusal = "" if load.error is None else f", refused the active version: {load.error}"
        lines.append(_line("", f"{load.worker} runs {load.version}{refusal}"))
    gone = sorted((load for load in state.loads if load.worker not in state.workers), key=lambda load: -load.load_id)
    for load in gone[:MOST_GONE_WORKERS]:
        last = f"last ran {load.version}, loaded at {shown(load.loaded_at)}; not responding now"
        lines.append(_line("", f"{load.worker} {last}", "dim"))
    if more := len(gone) - MOST_GONE_WORKERS:
        lines += [_line("", f"{more:,} other workers of the past do not respond either", "dim")] if more > 0 else []
    return lines


def drift_lines(drift: "Drift") -> list[Text]:
    """What has moved within a day: scores, actions, and what reviewers say."""
    lines: list[Text] = []
    for psi, expected in ((drift.psi_held_out, "the held-out rows"), (drift.psi_before, "the day before")):
        if psi is not None:
            lines.append(_line("" if lines else "drift", f"against {expected}: {_moved(psi)}"))
    if lines and drift.psi_before is None:
        lines.append(_line("", "expected on the first day: your comments differ from the training rows"))
    if lines:
        before = drift.action_shares_before
        shares = (
            f"{action} {share:.1%}{f' (the day before {before.get(action, 0):.1%})' if before else ''}"
            for action, share in drift.action_shares.items()
        )
        lines.append(_line("", ", ".join(shares)))
    if drift.overturned_share is not None:
        overturned = f"of {drift.reviewed:,} reviewed within a day {drift.overturned_share:.1%} overturned"
        lines.append(_line("" if lines else "drift", overturned))
    return lines


def _moved(psi: "Mapping[str, float]") -> str:
    from config.drift import level

    moved = [
        f"{label} {value:.2f} {level(value)}"
        for label, value in sorted(psi.items(), key=lambda each: -each[1])
        if level(value) != "stable"
    ]
    return ", ".join([*moved, "the others stable"] if 0 < len(moved) < len(psi) else moved or ["stable"])


def _policy_lines(state: "Status") -> list[Text]:
    """The active policy, and which workers decide by another; without one, by which policy each worker decides."""
    policy, pipelines = state.policy, state.pipelines
    if policy is None:
        return [
            _line("" if index else "policies", worker_line(node, stats.policy_version, stats.policy_refusal))
            for index, (node, stats) in enumerate(pipelines.items())
        ]
    since = f"by {policy.activated_by} at {shown(policy.activated_at)}: {policy.reason}"
    others = {node: stats for node, stats in pipelines.items() if stats.policy_version != policy.policy_version}
    lines = (worker_line(node, stats.policy_version, stats.policy_refusal) for node, stats in others.items())
    return [
        _line("policy", f"{policy.policy_version[:HASH_CHARS]}, {since}"),
        *(_line("", line, "yellow") for line in lines),
    ]


def _watched_lines(activity: "Activity", rates: "Mapping[str, PipelineRates]") -> list[Text]:
    now = shown(datetime.now().astimezone())
    problems = [Text(f"moderato: {problem}", "red") for problem in activity.problems]
    return [Text(f"{now}, Ctrl-C ends", "dim"), *_node_lines(activity), *_pipeline_lines(activity, rates), *problems]


def _node_lines(activity: "Activity") -> list[Text]:
    nobody = "none responding" if activity.queue_depths else "unknown: the broker is unreachable"
    lines = [
        _line("workers", ", ".join(activity.workers) or nobody),
        _line("trainers", ", ".join(activity.trainers) or nobody),
    ]
    if activity.queue_depths:
        depths = ", ".join(f"{queue} {messages:,}" for queue, messages in activity.queue_depths.items())
        lines.append(_line("messages", f"{depths}; {activity.held_messages:,} held"))
        # Without any worker that is said already.
        for queue in activity.queues_without_worker if activity.workers else ():
            lines.append(_line("", f"no worker takes from {queue}: name it in a worker's -Q", "red"))
    return lines


def _pipeline_lines(activity: "Activity", rates: "Mapping[str, PipelineRates]") -> list[Text]:
    lines = []
    for worker, stats in activity.pipelines.items():
        lines += [Text(), *_lines_of_one(worker, stats, rates[worker])]
    if len(rates) > 1:
        together = sum(rate.comments_per_s for rate in rates.values())
        lines += [Text(), _line("together", f"{together:,.1f} comments/s")]
    return lines


def _lines_of_one(worker: str, stats: "PipelineStats", rates: "PipelineRates") -> list[Text]:
    lanes = f", {stats.lanes} lanes" if stats.lanes > 1 else ""
    speed = f"{rates.comments_per_s:,.1f} comments/s, {rates.tokens_per_s:,.0f} tokens/s"
    of_comments = _percent((rates.cache_hit_share, "cached"), (rates.duplicate_share, "duplicates"))
    of_tokens = _percent((rates.batch_fill, "full"), (rates.padding_waste, "padding"))
    size = [] if rates.comments_per_batch is None else [f"{rates.comments_per_batch:,.1f} comments"]
    held = f"holds {stats.held_comments:,} of {stats.max_held_comments:,} comments"
    lines = [
        _line(worker, f"{stats.version} on {stats.engine}{lanes}, up {_duration(stats.uptime_s)}", "bold"),
        _line("", f"{speed} on average over the last {_duration(rates.seconds)}"),
        _line("", ", ".join([held, *of_comments])),
        _line("", f"a batch: {', '.join([*size, *of_tokens]) or 'none'}"),
        _line("", f"{'stage':<9}{'per comment':>11}  {'busy':<{BAR_CHARS}}{'waiting':>14}", "dim"),
    ]
    for stage, found in rates.stages.items():
        cost = "" if found.ms_per_comment is None else f"{found.ms_per_comment:.3f} ms"
        bar = "█" * round(BAR_CHARS * found.utilisation)
        value = f"{stage:<9}{cost:>11}  {bar:·<{BAR_CHARS}} {found.utilisation:>4.0%} {stats.waiting.get(stage, 0):>8,}"
        if stage == rates.bottleneck:
            lines.append(_line("", f"{value}  bottleneck", "yellow"))
        else:
            lines.append(_line("", value))
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _percent(*shares: tuple[float | None, str]) -> list[str]:
    return [f"{share:.1%} {meaning}" for share, meaning in shares if share is not None]


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
