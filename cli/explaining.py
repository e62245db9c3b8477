"""`moderato explain`: how a decision came about, and whether the same version says the same again."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from cli.comment_ids import CommentCommunity, CommentId, community_of
from cli.terminal import ACTION_STYLES, Problem, out, print_json, print_line, printable, say, shorten, shown
from config.names import DEFAULT_COMMUNITY, LABELS, MAX_TEXT_BYTES, Action

if TYPE_CHECKING:
    from config.policy import Policy, Rules
    from model.engine import Scorer

SAME = 1e-5
"""How far a score may move with the batch it is in: the rounding of sums taken in another order."""
CUT = "the text is too long once it is normalised: only its beginning was scored, so a person must see the rest"
NAME_CHARS = 14
"""Of a line: the name of what it says, and a space."""


def explain(
    submission_id: Annotated[str | None, typer.Argument(metavar="ID", help="As `moderato results` shows it.")] = None,
    comment_id: CommentId = None,
    community: CommentCommunity = None,
    rerun: Annotated[
        bool,
        typer.Option("--rerun", help="Score the text again by the version that decided; exit status 1 if it differs."),
    ] = False,
    text: Annotated[
        bool,
        typer.Option("--text", help="With --rerun: show the windows that scored highest. They may be abusive."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; docs/explain.md has its keys.")] = False,
) -> None:
    """Explain a decision: scores, the rule that fired and how near the others were, policy, version, way and reviews.

    Example: moderato explain 01a2063d-7c59-75c0-b450-e661be7a987f:2 --rerun

    Example: moderato explain --comment-id 42 --community news --json
    """
    if (submission_id is None) == (comment_id is None):
        raise Problem("give either a submission's id or --comment-id: moderato explain --comment-id 42")
    if text and not rerun:
        raise Problem("--text shows the windows of a text that is scored again: add --rerun")

    from api_client.client import ModerationClient

    with ModerationClient() as client:
        if comment_id is not None:
            community = community_of(client, comment_id, community)
            submission_id = client.newest_submission(comment_id, community=community)
            if submission_id is None:
                raise Problem(f"community {community!r} has no submission of comment {comment_id!r}")
        assert submission_id is not None
        explained = client.explain(submission_id)
        if explained is None:
            raise Problem(
                f"there is no submission and no dead letter {submission_id!r}: it may wait in the queue still; "
                "`moderato results` and `moderato dead-letters` list what there is"
            )
        result = client.result(submission_id) if rerun else None
    policy = _policy(explained)
    scores = explained["decision"] and explained["decision"]["scores"]
    explained["margins"] = policy and margins(policy.rules(explained["community"]), scores)
    if rerun:
        explained["rerun"] = _rerun(explained, result.text if result else None, policy, with_text=text)
    if as_json:
        print_json(explained)
    else:
        _show(explained)
    if rerun and explained["rerun"]["verdict"] not in ("same", "near"):
        raise typer.Exit(1)


# --- The policy --------------------------------------------------------------------------------------------------


def _policy(explained: Mapping[str, Any]) -> "Policy | None":
    """The one that decided; None where nothing was, or it is of a form that this release does not know."""
    from config.policy import PolicyError, parse_policy

    if explained["policy"] is None:
        return None
    try:
        return parse_policy(explained["policy"]["text"])
    except PolicyError as error:
        say(f"moderato: the policy that decided cannot be read: {error}")
        return None


def margins(rules: "Rules", scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Of each label the strictest rule that its score reached, and how far below the next one it stayed."""
    found = {}
    for label in LABELS:
        score = scores[label]
        reached = next(((at, action) for at, action in reversed(rules[label]) if score >= at), (None, None))
        following = next(((at, action) for at, action in rules[label] if score < at), (None, None))
        found[label] = {
            "reached_threshold": reached[0],
            "reached_action": reached[1],
            "next_threshold": following[0],
            "next_action": following[1],
            "missing": None if following[0] is None else following[0] - score,
        }
    return found


def rule_lines(policy: str, community: str, label: str) -> list[tuple[int, str]]:
    """The lines, numbered from 1, in which a sound policy says what a label leads to in a community."""
    from config.policy import INHERITS

    _, communities = _pairs(yaml.compose(policy, Loader=yaml.SafeLoader))["communities"]
    stated = _pairs(communities)
    name: str | None = community if community in stated else DEFAULT_COMMUNITY
    while name in stated:
        rules = _pairs(stated[name][1])
        if label in rules:
            key, value = rules[label]
            numbers = {key.start_mark.line, *range(value.start_mark.line, _last_line(value) + 1)}
            return [(number + 1, policy.splitlines()[number]) for number in sorted(numbers)]
        above = rules[INHERITS][1].value if INHERITS in rules else DEFAULT_COMMUNITY
        name = None if name == DEFAULT_COMMUNITY else above
    return []


def _last_line(node: Any) -> int:
    # A mapping without braces ends where the next thing begins, by its own account.
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1][1])
    return int(node.end_mark.line)


def _pairs(mapping: Any) -> dict[str, tuple[Any, Any]]:
    """Of a YAML mapping each name's key and value; what it merges counts where it does not say so itself."""
    from config.policy import MERGE_TAG

    found: dict[str, tuple[Any, Any]] = {}
    own = {}
    for key, value in mapping.value:
        if key.tag != MERGE_TAG:
            own[key.value] = key, value
            continue
        for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            found = _pairs(merged) | found
    return found | own


# --- Scoring again -----------------------------------------------------------------------------------------------


def _rerun(
    explained: Mapping[str, Any], text: str | None, policy: "Policy | None", *, with_text: bool
) -> dict[str, Any]:
    from config.settings import settings
    from model.engine import load_scorer
    from model.text import is_truncated
    from model.version import VersionError, version_directory

    decision, worker = explained["decision"], settings().worker
    if decision is None:
        return _not_run("there is no decision to compare with")
    if text is None:
        erased_at = explained["text"]["erased_at"]
        return _not_run(f"its text was erased at {erased_at}" if erased_at else "its text was never stored")
    version = explained["version"]["version"]
    try:
        directory = version_directory(version, settings().versions_dir)
    except VersionError as error:
        return _not_run(f"its version's files are not here: {error}")
    tried: list[dict[str, Any]] = []
    refusals: list[str] = []
    # The row does not say which engine decided.
    for engine, device in (("onnx", "cpu"), ("torch", worker.device)):
        try:
            scorer = load_scorer(
                directory, device=device, engine=engine, threads=worker.threads, expected_version=version
            )
        except VersionError as error:
            refusals.append(str(error))
            continue
        tried.append(_scored_again(scorer, text, decision["scores"], with_text=with_text))
        if tried[-1]["largest_difference"] <= SAME:
            break
    if not tried:
        return _not_run(f"its version cannot be loaded here: {'; '.join(refusals)}")
    nearest = min(tried, key=lambda each: each["largest_difference"])
    action = None
    if policy is not None:
        # By what is read of the text now: a release that read more of it may have decided.
        action = policy.decide(
            explained["community"], list(nearest["scores"].values()), truncated=is_truncated(text)
        ).action.value
    return nearest | {"action": action} | _verdict(nearest["largest_difference"], action, decision["action"])


def _not_run(why: str) -> dict[str, Any]:
    return {"verdict": "not_run", "meaning": why}


def _scored_again(scorer: "Scorer", text: str, before: Mapping[str, float], *, with_text: bool) -> dict[str, Any]:
    read, spans = scorer.text_encoder.locate(text)
    # Each by itself: a window's scores do not depend on its neighbours.
    rows = [scorer.engine.score([ids])[0].tolist() for ids in scorer.encode([text])[0]]
    scores = dict(zip(LABELS, map(max, zip(*rows, strict=True)), strict=True))
    windows = [
        {
            "start": start,
            "end": end,
            "scores": dict(zip(LABELS, row, strict=True)),
            "highest": [label for label, score in zip(LABELS, row, strict=True) if score == scores[label]],
            **({"text": read[start:end]} if with_text else {}),
        }
        for (start, end), row in zip(spans, rows, strict=True)
    ]
    apart = {label: abs(scores[label] - before[label]) for label in LABELS}
    label = max(apart, key=apart.__getitem__)
    return {
        "engine": scorer.engine.description,
        "scores": scores,
        "largest_difference": apart[label],
        "differs_most": label,
        "text_is_read_otherwise": read != text,
        "windows": windows,
    }


def _verdict(difference: float, action: str | None, before: str) -> dict[str, Any]:
    """What the largest difference means."""
    from model.engine import ONNX_PROBE_TOLERANCE

    if difference <= SAME:
        verdict, meaning = "same", "the same scores"
    elif difference <= ONNX_PROBE_TOLERANCE:
        verdict = "near"
        meaning = "as far apart as processors and number formats round; the row does not say which engine decided"
    else:
        verdict = "other"
        meaning = (
            "further apart than one engine is from itself: one that this host lacks decided (int8, fp32 and bf16 may "
            "differ by tenths on single texts), or a release that read texts otherwise"
        )
    if action not in (None, before):
        meaning += f"; the action would be {action}"
    return {"verdict": verdict, "meaning": meaning}


# --- For people --------------------------------------------------------------------------------------------------


def _show(explained: Mapping[str, Any]) -> None:
    for line in _lines(explained):
        _print(line)
    if explained.get("rerun"):
        _show_rerun(explained["rerun"])


def _print(line: Text) -> None:
    print_line(line, NAME_CHARS)


def _lines(explained: Mapping[str, Any]) -> Iterator[Text]:
    decision, letter, way = explained["decision"], explained["dead_letter"], explained["way"]
    of = f": comment {explained['comment_id']} of community {explained['community']}" if explained["community"] else ""
    author = f", by {explained['author']}" if explained["author"] else ""
    yield _line("submission", printable(f"{explained['submission_id']}{of}{author}"))
    if decision is not None:
        by = "" if explained["decided_by"] == "model" else f", by {explained['decided_by']}; the model: "
        now = Text(f"{explained['action']}", ACTION_STYLES[explained["action"]])
        yield _line("action", "").append_text(now).append(f"{by}{decision['action']}" if by else "")
        yield _line("because", _because(decision))
        yield from _score_lines(decision, explained["margins"])
        yield from _policy_lines(explained)
        yield from _version_lines(explained["version"], way["trial"])
    elif letter is not None:
        yield _line("dead letter", f"{letter['reason']}, received {_at(letter['received_at'])}")
        yield _line("", f"{shorten(letter['detail'], 500)}")
        yield _line("", f"`moderato dead-letters show {explained['submission_id']}` says what to do")
    else:
        yield _line("action", f"none yet: {explained['state']}")
    yield from _way_lines(explained)
    if letter is None:  # whose message may hold it
        yield _line("text", _text_state(explained["text"]))
    for opinion in explained["other_versions"]:
        said = f"failed: {opinion['error']}" if opinion["scores"] is None else f"would {opinion['action']}"
        yield _line("also asked", f"{opinion['version']} ({opinion['kind']}) {said}")
    for review in explained["reviews"]:
        labels = "".join(f", {label}={int(value)}" for label, value in review["labels"].items())
        note = f": {shorten(review['note'], 500)}" if review["note"] else ""
        yield _line("review", f"{_at(review['reviewed_at'])} {review['reviewer']}: {review['action']}{labels}{note}")


def _at(time: str) -> str:
    return shown(datetime.fromisoformat(time))


def _line(name: str, value: str) -> Text:
    return Text(f"{name:<{NAME_CHARS}}{value}")


def _because(decision: Mapping[str, Any]) -> str:
    rule = decision["rule"]
    if rule is None:
        return CUT if decision["truncated"] and decision["action"] == Action.REVIEW else "no rule fired"
    return f"{rule['label']} {rule['score']:.4f} is at or above {rule['threshold']:g}, which leads to {rule['action']}"


def _score_lines(decision: Mapping[str, Any], margins: Mapping[str, Any] | None) -> Iterator[Text]:
    fired = decision["rule"]["label"] if decision["rule"] else None
    for label, score in decision["scores"].items():
        words = []
        if margins is not None:
            margin = margins[label]
            if margin["reached_action"]:
                words.append(f"{margin['reached_action']} from {margin['reached_threshold']:g}")
            if margin["next_action"]:
                words.append(f"{margin['missing']:.4f} below {margin['next_action']} at {margin['next_threshold']:g}")
        value = f"{label:<14} {score:.4f}  {', '.join(words)}".rstrip()
        line = _line("scores" if label == LABELS[0] else "", value)
        yield Text.assemble(line, ("  fired", "bold")) if label == fired else line


def _policy_lines(explained: Mapping[str, Any]) -> Iterator[Text]:
    policy, rule = explained["policy"], explained["decision"]["rule"]
    activation = policy["activation"]
    whose = _activated(activation) if activation else "the worker's own file"
    yield _line("policy", f"{policy['version'][:12]}…, {whose}; first used {_at(policy['first_used_at'])}")
    lines = rule_lines(policy["text"], explained["community"], rule["label"]) if rule and explained["margins"] else []
    for number, text in lines:
        yield _line("", f"line {number}: {text.strip()}")


def _version_lines(version: Mapping[str, Any], trial: Mapping[str, Any] | None) -> Iterator[Text]:
    activation, held_out = version["activation"], version["held_out"]
    if trial is not None:
        whose = f"{trial['kind']} of {100 * trial['share']:g} % beside {trial['baseline']}"
    else:
        whose = _activated(activation) if activation else "never activated before"
    yield _line("version", f"{version['version']}, {whose}")
    parent = f"fine-tuned from {version['parent']}, " if version["parent"] else ""
    mean = held_out["mean_roc_auc"]
    figures = "" if mean is None else f"; mean ROC-AUC {mean:.4f} on {held_out['rows']:,} held-out rows"
    made = f"made {_at(version['created_at'])}" if version["created_at"] else "no manifest of it was stored"
    yield _line("", f"{parent}{made}{figures}")


def _activated(activation: Mapping[str, Any]) -> str:
    return f"activated by {activation['activated_by']} at {_at(activation['activated_at'])}: {activation['reason']}"


def _way_lines(explained: Mapping[str, Any]) -> Iterator[Text]:
    way, decision = explained["way"], explained["decision"]
    queue = f" to {way['queue']}, durable" if way["queue"] else ""
    if way["submitted_at"]:
        yield _line("way", f"submitted {_at(way['submitted_at'])}{queue}")
    if decision is not None:
        windows = f"{decision['windows']} window{'s' if decision['windows'] > 1 else ''}"
        computed = way["compute_ms"]
        batch = f"its batch took {computed:,.1f} ms" if computed else "scored with an earlier copy of it"
        waited = f"waited {way['queue_ms']:,.1f} ms, {batch}"
        yield _line("", f"{waited}, in {windows}; decided {_at(decision['decided_at'])}")


def _text_state(text: Mapping[str, Any]) -> str:
    if text["stored"]:
        return "stored"
    if text["erased_at"] is None:
        return "not stored"
    erasure = text["erasure"]
    by = f" by {erasure['erased_by']} ({erasure['kind']}){_reason(erasure['reason'])}" if erasure else ""
    return f"erased {_at(text['erased_at'])}{by}"


def _reason(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _show_rerun(rerun: Mapping[str, Any]) -> None:
    if rerun["verdict"] == "not_run":
        say(f"moderato: not scored again: {rerun['meaning']}")
        return
    difference = f"largest difference {rerun['largest_difference']:.2g} ({rerun['differs_most']})"
    _print(_line("scored again", f"{difference}: {rerun['meaning']}"))
    _print(_line("", f"on {rerun['engine']}"))
    of = "the text as the version reads it, disguises undone" if rerun["text_is_read_otherwise"] else "the text"
    _print(_line("windows", f"* the highest; characters of {of}"))
    # Without lines between them the columns fit into 80 characters.
    table = Table("", "characters", *LABELS, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, window in enumerate(rerun["windows"], start=1):
        scores = (f"{window['scores'][each]:.4f}{'*' if each in window['highest'] else ' '}" for each in LABELS)
        table.add_row(f"{number}", f"{window['start']:,}-{window['end']:,}", *scores)
    out.print(table)
    for number, window in enumerate(rerun["windows"], start=1):
        if "text" in window and window["highest"]:
            _print(_line(f"window {number}", shorten(window["text"], MAX_TEXT_BYTES)))
