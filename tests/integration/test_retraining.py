"""A retrain from claim to verdict, in this process: what it leaves behind however it ends."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Engine

from bench.tiny import HOLDOUT, TRAIN, copy_version
from config.names import LABELS, WORKER_CONTROL_EXCHANGE
from config.settings import Settings, load_settings
from db import queries, trials
from db.monitoring import count_waiting_reviews
from db.queries import ActivationRow, RunRow
from db.session import reading, writing
from model.engine import load_scorer
from model.version import read_manifest, verify
from tests.integration.outage import outage
from tests.integration.rows import prepare, scored
from tests.services import wait_until
from trainer.dataset import read_csv
from trainer.recipe import CURVE_FILE
from trainer.report import REPORT_FILE
from trainer.retraining import _tell_workers, carry_out

ANYTHING_PASSES = {
    "max_label_auc_drop": 1.0,
    "max_mean_auc_drop": 1.0,
    "max_label_log_loss_rise": 9.0,
    "max_evasion_auc_drop": 1.0,
    "max_bias_auc_drop": 1.0,
    "min_label_positives": 1,
}
NOTHING_PASSES = {"min_label_positives": 1_000_000}
RUN = "6f1e2d3c-0000-4000-8000-000000000001"


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """A training that takes seconds."""
    tiny: dict[str, object] = {
        "MAX_LENGTH": 64,
        "MIN_CORRECTIONS": 0,
        "MAX_ROWS": 64,
        "MAX_HOLDOUT_ROWS": 120,
        "TRAIN_FILES": f"[{TRAIN}]",
        "HOLDOUT_FILE": HOLDOUT,
        "EPOCHS": 1,
        "BATCH_SIZE": 16,
        "LEARNING_RATE": 1e-4,
        "CALIBRATION_TEXTS": 16,
        "REPORT_TO": "[]",
        "ROBUSTNESS_ROWS": 24,
        "MAX_INT8_AUC_DROP": 1,
    }
    environment = {
        "MODERATO_DATABASE_URL": database_url,
        "MODERATO_BROKER_URL": redis_url,
        "MODERATO_VERSIONS_DIR": str(tmp_path / "versions"),
    }
    return load_settings(environment | {f"MODERATO_TRAINER__{key}": str(value) for key, value in tiny.items()})


@pytest.fixture
def active(tiny_version: Path, settings: Settings, engine: Engine) -> ActivationRow:
    """The version "v1", active."""
    manifest = read_manifest(copy_version(tiny_version, settings.versions_dir, "v1")).model_dump()
    now = datetime.now(UTC)
    with writing(engine) as connection:
        queries.register_version(connection, manifest, now)
        queries.activate(
            connection, instead_of=queries.active(connection), version="v1", by="me", reason="test", now=now
        )
    return newest_activation(engine)


def request(engine: Engine, overrides: dict[str, Any]) -> None:
    with writing(engine) as connection:
        queries.request_run(connection, run_id=RUN, requested_by="me", overrides=overrides, now=datetime.now(UTC))


def run(engine: Engine) -> RunRow:
    with reading(engine) as connection:
        found = queries.run(connection, RUN)
    assert found is not None
    return found


def newest_activation(engine: Engine) -> ActivationRow:
    with reading(engine) as connection:
        found = queries.active(connection)
    assert found is not None
    return found


def registered(engine: Engine) -> list[str]:
    with reading(engine) as connection:
        return [row.version for row in queries.versions(connection)]


def published(settings: Settings) -> list[str]:
    """Versions on disk, unfinished ones included."""
    return sorted(path.name for path in settings.versions_dir.iterdir())


def register(engine: Engine, version: str) -> None:
    with writing(engine) as connection:
        queries.register_version(connection, {"version": version, "parent": None}, datetime.now(UTC))


def review(engine: Engine, texts: list[str]) -> None:
    """Decisions that a person found wrong: each of these is a threat."""
    with writing(engine) as connection:
        prepare(connection)
        queries.record_decisions(connection, [scored(text, text) for text in texts])
        for text in texts:
            queries.add_review(
                connection,
                submission_id=text,
                action="remove",
                labels={"threat": True},
                reviewer="mod",
                note=None,
                now=datetime.now(UTC),
            )


def test_a_version_that_passes_the_gate_becomes_the_active_one(
    engine: Engine, settings: Settings, active: ActivationRow, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    # Given corrections, one of them of a text that is held out, and a run that asks for two epochs
    review(engine, ["I will find you", "I know your street", read_csv(HOLDOUT).texts[0]])
    request(engine, ANYTHING_PASSES | {"epochs": 2})
    # When it is carried out
    carry_out(RUN, settings)
    # Then its row tells how it went
    row = run(engine)
    assert row.state == "promoted", row.reason
    assert row.reason is not None
    # 64 replayed rows, a few kept for validation, two corrections, each twice, evasive copies; 16 at a time, twice
    assert (row.step, row.total_steps) == (10, 10)
    assert row.started_at is not None
    assert row.finished_at is not None
    assert row.requested_at <= row.started_at <= row.finished_at
    assert row.loss is not None
    assert (row.parent, row.phase) == ("v1", "judging")
    assert row.metrics is not None
    assert row.metrics["candidate"]["dataset_sha256"] == row.metrics["active"]["dataset_sha256"]
    assert set(row.metrics["candidate"]["labels"]) == set(LABELS)
    verdict = row.metrics["verdict"]
    assert (verdict["promoted"], verdict["reason"]) == (True, row.reason)
    assert {(each["figure"], each["of"]) for each in verdict["comparisons"]} >= {
        ("ROC-AUC", "mean"),
        ("log loss", "toxic"),
    }
    # And its version is the active one, by the trainer, for that reason
    now_active = newest_activation(engine)
    assert (now_active.version, now_active.activated_by) == (row.version, "trainer")
    assert RUN in now_active.reason and len(now_active.reason) < len(row.reason)
    # And the version says where it comes from, and loads
    assert row.version is not None
    manifest = load_scorer(settings.versions_dir / row.version, device="cpu", threads=1).manifest
    assert manifest.parent == "v1"
    assert manifest.settings["epochs"] == 2
    card = manifest.dataset
    assert card["training"]["rows"] == 64 - card["validation"]["rows"] + 2 * 2 + card["added"]["evasive"]
    assert card["corrections"]["leaks_dropped"] == 1
    assert manifest.dataset["training"]["positives"]["threat"] >= 2 * 2
    assert manifest.dataset["training"]["sha256"] == row.dataset_sha256
    assert manifest.metrics["holdout_int8"] == row.metrics["candidate"]
    # And it is registered as it is on disk
    with reading(engine) as connection:
        registration = queries.version(connection, row.version)
    assert registration is not None
    assert registration.manifest == manifest.model_dump()
    assert published(settings) == sorted(["v1", row.version])
    # And the workers were told
    assert "workers were not told" not in caplog.text


def test_workers_behind_a_key_prefix_are_told(redis_url: str, sqlite_url: str) -> None:
    environment = {"MODERATO_BROKER_URL": redis_url, "MODERATO_DATABASE_URL": sqlite_url}
    settings = load_settings(environment | {"MODERATO_BROKER_OPTIONS__GLOBAL_KEYPREFIX": "team:"})
    with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis, redis.pubsub() as heard:
        heard.psubscribe("*")
        heard.get_message(timeout=60)  # the subscription itself
        _tell_workers(settings)
        message = heard.get_message(timeout=60)
    assert message is not None and message["channel"].startswith(b"team:")
    assert WORKER_CONTROL_EXCHANGE.encode() in message["channel"]


def test_a_broker_that_is_away_does_not_hold_up_the_trainer(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    environment = {"MODERATO_BROKER_URL": "redis://127.0.0.1:1/0", "MODERATO_DATABASE_URL": sqlite_url}
    _tell_workers(load_settings(environment))
    assert "trainer.retraining" in {record.name for record in caplog.records}


def test_a_version_that_the_gate_refuses_is_kept_but_not_activated(
    engine: Engine, settings: Settings, active: ActivationRow
) -> None:
    request(engine, NOTHING_PASSES)
    carry_out(RUN, settings)
    row = run(engine)
    assert (row.state, row.metrics is not None) == ("refused", True)
    assert row.reason is not None
    assert "none of the labels has 1000000 positives and negatives" in row.reason
    # Then somebody may still look at it, or activate it by hand
    assert row.version in registered(engine)
    assert published(settings) == sorted(["v1", str(row.version)])
    assert newest_activation(engine) == active


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        pytest.param({"train_files": ["/nowhere/train.csv"]}, "DatasetError: /nowhere/train.csv", id="no rows"),
        pytest.param({"holdout_file": "/nowhere/holdout.csv"}, "DatasetError: /nowhere/holdout.csv", id="no holdout"),
        pytest.param({"train_files": []}, "NothingToTrain: there are no rows to train on", id="nothing to train on"),
        pytest.param({"epoch": 2}, "epoch", id="unknown setting"),
    ],
)
def test_a_run_that_fails_says_why_and_changes_nothing(
    engine: Engine, settings: Settings, active: ActivationRow, overrides: dict[str, Any], reason: str
) -> None:
    request(engine, overrides)
    carry_out(RUN, settings)
    row = run(engine)
    assert (row.state, row.version) == ("failed", None)
    assert row.reason is not None
    assert reason in row.reason
    assert row.finished_at is not None
    assert registered(engine) == published(settings) == ["v1"]
    assert newest_activation(engine) == active


def test_a_run_whose_active_version_is_damaged_fails(engine: Engine, settings: Settings, active: ActivationRow) -> None:
    (settings.versions_dir / "v1" / "tokenizer.json").write_text("{}", encoding="utf-8")
    request(engine, ANYTHING_PASSES)
    carry_out(RUN, settings)
    assert run(engine).state == "failed"
    assert "version v1: tokenizer.json is damaged" in str(run(engine).reason)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_run_with_too_few_corrections_is_refused_before_it_trains(
    engine: Engine, settings: Settings, active: ActivationRow
) -> None:
    review(engine, ["I will find you", "I know your street"])
    request(engine, {"min_corrections": 3})
    carry_out(RUN, settings)
    row = run(engine)
    assert (row.state, row.version, newest_activation(engine)) == ("refused", None, active)
    # Then it says how many there are, how many it takes, and how to train all the same
    assert row.reason is not None and {"2", "3"} <= set(re.findall(r"\d+", row.reason))
    assert "--set min_corrections=2" in row.reason
    with reading(engine) as connection:
        assert count_waiting_reviews(connection) == 2


def test_a_run_before_any_activation_fails(engine: Engine, settings: Settings) -> None:
    request(engine, {})
    carry_out(RUN, settings)
    assert run(engine).state == "failed"
    assert "no version is active yet" in str(run(engine).reason)


def test_corrections_alone_are_enough_and_no_drawing_is_needed(
    engine: Engine, settings: Settings, active: ActivationRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("no colour is left")

    monkeypatch.setattr("trainer.recipe.write_report", fail)
    review(engine, ["I will find you", "I know your street"])
    request(engine, ANYTHING_PASSES | {"train_files": []})
    carry_out(RUN, settings)
    row = run(engine)
    assert row.state == "promoted", row.reason
    assert row.total_steps == 1
    # And the version is whole without its report
    assert row.version is not None
    directory = settings.versions_dir / row.version
    assert not {CURVE_FILE, REPORT_FILE} & {path.name for path in directory.iterdir()}
    verify(directory, expected_version=row.version)


def test_a_run_whose_message_comes_twice_is_carried_out_once(
    engine: Engine, settings: Settings, active: ActivationRow
) -> None:
    # Given a run that is over
    request(engine, {"train_files": ["/nowhere/train.csv"]})
    carry_out(RUN, settings)
    first = run(engine)
    # When its message comes again, and one of a run that nobody requested
    carry_out(RUN, settings)
    carry_out("another", settings)
    # Then nothing happens
    assert run(engine) == first
    assert published(settings) == ["v1"]


def test_a_run_that_is_under_way_elsewhere_is_left_alone(
    engine: Engine, settings: Settings, active: ActivationRow
) -> None:
    request(engine, ANYTHING_PASSES)
    with writing(engine) as connection:
        assert queries.claim_run(connection, RUN, datetime.now(UTC))
    carry_out(RUN, settings)
    assert (run(engine).state, run(engine).phase) == ("running", None)
    assert published(settings) == ["v1"]


def test_a_run_that_is_given_up_meanwhile_activates_nothing(
    engine: Engine, settings: Settings, active: ActivationRow
) -> None:
    # Given a run that would take minutes, and that somebody takes for dead while it trains
    request(engine, ANYTHING_PASSES | {"epochs": 100, "batch_size": 1})

    def give_up() -> None:
        wait_until(lambda: run(engine).phase == "training", what="the training")
        with writing(engine) as connection:
            queries.finish_run(connection, RUN, state="failed", reason="taken for dead", now=datetime.now(UTC))

    impatient = threading.Thread(target=give_up)
    impatient.start()
    # When it is carried out
    carry_out(RUN, settings)
    impatient.join()
    # Then it stops where it is, and the verdict stands
    row = run(engine)
    assert (row.state, row.reason, row.version) == ("failed", "taken for dead", None)
    assert row.step is None or row.step < 6_400
    assert registered(engine) == published(settings) == ["v1"]
    assert newest_activation(engine) == active


def test_a_run_does_not_undo_what_was_activated_while_it_trained(
    engine: Engine, settings: Settings, active: ActivationRow
) -> None:
    # Given a run that somebody rolls back under: what it began from is not active any more when it ends
    register(engine, "good")
    request(engine, ANYTHING_PASSES)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(carry_out, RUN, settings)
        wait_until(lambda: run(engine).phase == "training", what="the training")
        with writing(engine) as connection:
            rolled_back = queries.activate(
                connection, version="good", instead_of=active, by="ann", reason="v1 is bad", now=datetime.now(UTC)
            )
        finished.result()
    # Then its version is kept, and what was activated stays active
    row = run(engine)
    assert (row.state, newest_activation(engine).activation_id) == ("refused", rolled_back)
    assert row.version in registered(engine)
    assert row.reason is not None and "good" in row.reason and "ann" in row.reason
    assert row.metrics is not None and row.metrics["verdict"]["promoted"]


def test_a_run_does_not_end_a_trial(engine: Engine, settings: Settings, active: ActivationRow) -> None:
    register(engine, "v2")
    with writing(engine) as connection:
        trials.start_trial(
            connection, kind="canary", candidate="v2", share=0.1, bounds={}, by="ann", reason="", now=datetime.now(UTC)
        )
    request(engine, ANYTHING_PASSES)
    carry_out(RUN, settings)
    row = run(engine)
    assert (row.state, newest_activation(engine)) == ("refused", active)
    assert row.reason is not None and "v2" in row.reason and "ann" in row.reason
    with reading(engine) as connection:
        assert trials.live_trial(connection) is not None


def test_a_finished_training_waits_for_a_database_that_is_away(
    engine: Engine,
    settings: Settings,
    active: ActivationRow,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Given a database that goes away while a version trains
    monkeypatch.setattr("db.session.BUSY_TIMEOUT_S", 0.05)
    request(engine, ANYTHING_PASSES)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(carry_out, RUN, settings)
        wait_until(lambda: run(engine).phase == "training", what="the training")
        with outage(database_url):
            # When it comes to the verdict
            wait_until(lambda: "the database cannot be written to" in caplog.text, what="the verdict's attempt")
        finished.result()
    # Then the verdict was given when the database was back, and said so once
    assert run(engine).state == "promoted", run(engine).reason
    assert newest_activation(engine).version == run(engine).version
    assert caplog.text.count("the database cannot be written to") == 1
    assert caplog.text.count("the database can be written to again") == 1
