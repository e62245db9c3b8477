"""Explaining a decision: everything that is known of it, and the same scores again."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert

from api_client.client import ModerationClient
from bench.tiny import copy_version
from config.names import LABELS
from db import queries, trials
from db.activations import NEWEST_POSITION
from db.durable import record_pending
from db.privacy import Subject
from db.session import writing
from db.tables import PolicyActivation
from db.trials import TrialScoreRow, record_trial_scores
from model.engine import load_scorer
from tests.commands import run_here
from tests.integration.rows import NOON, POLICY_VERSION, decide, letter, minutes, pending, prepare, scored

MANIFEST = {
    "version": "v1",
    "parent": "v0",
    "created_at": "2026-11-21T10:00:00+00:00",
    "metrics": {"holdout_int8": {"rows": 120, "mean_roc_auc": 0.9, "labels": {"toxic": {"roc_auc": 0.8}}}},
}


@pytest.fixture
def client(engine: Engine, database_url: str) -> Iterator[ModerationClient]:
    with ModerationClient("redis://127.0.0.1:1/0", database_url) as client:
        yield client


def test_an_explanation_holds_all_that_is_known(client: ModerationClient, engine: Engine) -> None:
    # Given a decision by an activated version and policy, in an A/B test, with two reviews and a shadow's opinion
    row = scored(
        "1", community="news", comment_id="42", author="ann", toxic=0.95, action="hide", fired_label="toxic",
        fired_threshold=0.9, windows=3, decided_at=minutes(-10),
    )  # fmt: skip
    with writing(engine) as connection:
        prepare(connection, "v2")
        queries.register_version(connection, MANIFEST, NOON)
        activated_by = iter(["early", "in force", "late"])
        for at in (-5, 5, 15):
            by = next(activated_by)
            queries.activate(
                connection, instead_of=queries.active(connection), version="v1", by=by, reason="better", now=minutes(at)
            )
            activation = {
                "policy_version": POLICY_VERSION, "activated_at": minutes(at), "activated_by": by, "reason": "milder",
                "after_position": NEWEST_POSITION,
            }  # fmt: skip
            connection.execute(insert(PolicyActivation).values(activation))
            if by == "in force":  # by its place, whatever the clocks say
                queries.record_decisions(connection, [row])
        for number, action in enumerate(("remove", "allow"), start=1):
            queries.add_review(
                connection, submission_id="1", action=action, labels={"toxic": number == 1}, reviewer=f"mod{number}",
                note="why", now=minutes(20 + number),
            )  # fmt: skip
        queries.activate(
            connection, instead_of=queries.active(connection), version="v2", by="t", reason="baseline", now=minutes(30)
        )
        trial_id = trials.start_trial(
            connection, kind="shadow", candidate="v1", share=1, bounds={}, by="t", reason="r", now=minutes(31)
        )
        scores: dict[str, Any] = dict.fromkeys(LABELS, 0.5)
        score_row = TrialScoreRow(trial_id=trial_id, submission_id="1", **scores, action="label", scored_at=minutes(32))
        record_trial_scores(connection, [score_row])

    explained = client.explain("1")

    # Then each of it is there, in JSON types
    assert explained is not None and json.loads(json.dumps(explained)) == explained
    assert (explained["state"], explained["community"], explained["comment_id"]) == ("decided", "news", "42")
    assert (explained["action"], explained["decided_by"]) == ("allow", "mod2")
    assert explained["decision"]["rule"] == {"label": "toxic", "score": 0.95, "threshold": 0.9, "action": "hide"}
    assert (explained["decision"]["scores"]["toxic"], explained["decision"]["windows"]) == (0.95, 3)
    assert explained["policy"]["version"] == POLICY_VERSION
    assert hashlib.sha256(explained["policy"]["text"].encode()).hexdigest() == POLICY_VERSION
    in_force = {"activated_at": minutes(5).isoformat(), "activated_by": "in force"}
    assert explained["policy"]["activation"] == in_force | {"reason": "milder"}
    assert explained["version"]["activation"] == in_force | {"reason": "better"}
    assert explained["version"]["parent"] == "v0"
    held_out = explained["version"]["held_out"]
    assert (held_out["rows"], held_out["mean_roc_auc"], held_out["roc_auc"]["toxic"]) == (120, 0.9, 0.8)
    assert explained["way"]["queue_ms"] == 1.5 and explained["way"]["trial"] is None
    assert [(each["reviewer"], each["action"], each["labels"]) for each in explained["reviews"]] == [
        ("mod1", "remove", {"toxic": True}),
        ("mod2", "allow", {"toxic": False}),
    ]
    assert [(each["version"], each["kind"], each["action"]) for each in explained["other_versions"]] == [
        ("v1", "shadow", "label")
    ]
    # But for what the comment says
    assert explained["text"]["stored"] and str(row.text) not in json.dumps(explained)


def test_a_decision_in_a_trial_names_the_trial(client: ModerationClient, engine: Engine) -> None:
    with writing(engine) as connection:
        prepare(connection, "v1", "v2")
        queries.activate(
            connection, instead_of=queries.active(connection), version="v1", by="t", reason="first", now=minutes(0)
        )
        queries.record_decisions(connection, [scored("before", model_version="v2", decided_at=minutes(2))])
        trials.start_trial(
            connection, kind="canary", candidate="v2", share=0.1, bounds={}, by="t", reason="r", now=minutes(1)
        )
        queries.record_decisions(connection, [scored("within", model_version="v2")])
    explained = client.explain("within")
    assert explained and explained["way"]["trial"] == {"trial_id": 1, "kind": "canary", "share": 0.1, "baseline": "v1"}
    assert explained["version"]["activation"] is None
    explained = client.explain("before")
    assert explained and explained["way"]["trial"] is None


def test_what_has_no_decision_says_why(client: ModerationClient, engine: Engine, database_url: str) -> None:
    # Given a dead comment, a message that was never one, and a durable submission that waits
    decide(database_url, letters=[letter("dead", text_sha256="0" * 64, community="news"), letter("unread")])
    with writing(engine) as connection:
        record_pending(connection, [pending("waits", community="news", comment_id="8")])
    for dead in ("dead", "unread"):
        explained = client.explain(dead)
        assert explained and (explained["state"], explained["decision"], explained["policy"]) == ("dead", None, None)
        assert (explained["dead_letter"]["reason"], explained["dead_letter"]["detail"]) == (
            "invalid_comment",
            "text is empty",
        )
        assert "payload" not in explained["dead_letter"]
    # And where the message named no comment, neither do we
    environment = {"MODERATO_BROKER_URL": "redis://127.0.0.1:1/0", "MODERATO_DATABASE_URL": database_url}
    shown = run_here(environment, "explain", "unread").stdout
    assert shown.startswith("submission    unread\ndead letter   invalid_comment, ") and "None" not in shown
    explained = client.explain("waits")
    assert explained and (explained["state"], explained["action"], explained["way"]["queue"]) == (
        "pending",
        None,
        "toxicity",
    )
    # And of what nobody knows nothing is said
    assert client.explain("unknown") is None
    # And a comment leads to its newest submission
    with writing(engine) as connection:
        record_pending(connection, [pending("later", community="news", comment_id="8", submitted_at=minutes(1))])
    assert client.newest_submission("8", community="news") == "later"
    assert client.newest_submission("8") is None


def test_an_erased_text_names_who_erased_it(client: ModerationClient, database_url: str) -> None:
    decide(database_url, scored("1", comment_id="42"), scored("2", text="never stored", comment_id="43"))
    client.erase(Subject("comment", "42"), by="ann", reason="asked for it")
    explained = client.explain("1")
    assert explained and not explained["text"]["stored"] and explained["text"]["erased_at"]
    assert explained["text"]["erasure"] == {"kind": "comment", "erased_by": "ann", "reason": "asked for it"}
    assert explained["decision"]["scores"]["toxic"] == 0.1


def test_the_same_version_says_the_same_again(sqlite_url: str, tiny_version: Path, tmp_path: Path) -> None:
    # Given a long text that was decided by a version whose files are there
    versions_dir = tmp_path / "versions"
    versions_dir.mkdir()
    directory = copy_version(tiny_version, versions_dir, "v1")
    text = "The water was cold and it was nice. " * 20 + "You stupid fool. " + "The weather is fine. " * 20
    scorer = load_scorer(directory, device="cpu", engine="onnx", threads=1)
    scores: dict[str, Any] = dict(zip(LABELS, scorer.score_texts([text])[0].tolist(), strict=True))
    cut = "\ufdfa" * 6_800  # of which only the beginning is read
    of_cut: dict[str, Any] = dict(zip(LABELS, scorer.score_texts([cut])[0].tolist(), strict=True))
    decide(
        sqlite_url,
        scored("1", text, **scores),
        scored("odd", text, **scores | {"toxic": 0.999}),
        scored("cut", cut, **of_cut, truncated=True, action="review"),
    )
    environment = {
        "MODERATO_BROKER_URL": "redis://127.0.0.1:1/0",
        "MODERATO_DATABASE_URL": sqlite_url,
        "MODERATO_VERSIONS_DIR": str(versions_dir),
    }

    def explain(*arguments: str, status: int) -> dict[str, Any]:
        done = run_here(environment, "explain", *arguments, "--rerun", "--json", status=status)
        rerun: dict[str, Any] = json.loads(done.stdout)["rerun"]
        return rerun

    # When it is scored again
    rerun = explain("1", "--text", status=0)
    # Then the scores are the same, and each window says what it gave and where it is
    assert rerun["verdict"] == "same" and rerun["largest_difference"] < 1e-5
    windows = rerun["windows"]
    assert len(windows) == len(scorer.encode([text])[0]) > 2
    assert {label for window in windows for label in window["highest"]} == set(LABELS)
    assert [windows[0]["start"], windows[-1]["end"]] == [0, len(text.rstrip())]
    assert all(text[window["start"] : window["end"]] == window["text"] for window in windows)
    # And where people look, the windows that scored highest are there in full
    shown = run_here(environment, "explain", "1", "--rerun", "--text").stdout
    assert all(window["text"].strip() in shown for window in windows if window["highest"])
    # And what is not read of a text is in no window
    assert explain("cut", status=0)["windows"][-1]["end"] < 18 * len(cut)
    # And a row that says something else is told apart
    assert explain("odd", status=1)["verdict"] == "other"
    # And without the version's files, or the text, nothing can be scored
    directory.rename(versions_dir / "pruned")
    rerun = explain("1", status=1)
    assert rerun["verdict"] == "not_run" and rerun["meaning"].startswith("its version's files are not here: version v1")
    with ModerationClient("redis://127.0.0.1:1/0", sqlite_url) as client:
        client.erase(Subject("comment", "comment of 1"), by="ann")
    assert explain("1", status=1)["meaning"].startswith("its text was erased at ")
