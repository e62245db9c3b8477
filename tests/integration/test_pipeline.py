"""The pipeline with a real scorer on real databases: whatever happens, every comment comes to exactly one end."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, event, text

from bench.tiny import HOLDOUT, copy_version
from config.identity import id_of_text, refused_id
from config.names import INTERACTIVE_QUEUE, LABELS
from config.policy import parse_policy
from config.settings import ROOT
from db import dead_letters, queries
from db.dead_letters import DeadLetterRow
from db.queries import Result
from db.session import open_database, reading, writing
from model.engine import Scorer, Scores, load_scorer
from model.text import TextEncoder, Windows
from tests.integration.moderator import POLICY, Moderator, wrapped
from tests.integration.outage import outage
from tests.services import wait_until
from trainer.dataset import read_csv
from worker.pipeline import EXIT_BROKEN
from worker.trial import LiveTrial

MARKER = "quoted-from-the-comment"
"""In every comment here, and so in no line of any log."""
POISON = f"{MARKER} poison poison poison"


@pytest.fixture(scope="module")
def scorer(tiny_version: Path) -> Scorer:
    return load_scorer(tiny_version, device="cpu", threads=1)


@pytest.fixture(autouse=True)
def nothing_is_quoted(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, no comment shows up in the log."""
    caplog.set_level("INFO")
    yield
    said = [caplog.handler.format(record) for record in caplog.get_records("call")]
    assert not [line for line in said if MARKER in line]


def comments(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Real ones of all lengths."""
    texts = read_csv(HOLDOUT).texts[first : first + count]
    return [{"text": f"{MARKER} {first + n}: {text}"[:2_000]} for n, text in enumerate(texts)]


def results(database: Engine) -> dict[str, Result]:
    with reading(database) as connection:
        return {result.submission_id: result for result in queries.results(connection)}


def letters(database: Engine) -> dict[str, DeadLetterRow]:
    with reading(database) as connection:
        return {letter.dead_letter_id: letter for letter in dead_letters.newest(connection, limit=1_000)}


def ids(message_id: str, count: int) -> set[str]:
    return {f"{message_id}:{index}" for index in range(count)}


class TestDeciding:
    def test_every_comment_is_decided_by_its_scores(self, scorer: Scorer, engine: Engine) -> None:
        # Given messages of one comment and of many, more than fit one batch
        sent = {"one": comments(1), "some": comments(30, 1), "many": comments(150, 31)}
        moderator = Moderator(scorer, engine)
        for message_id, listed in sent.items():
            moderator.deliver(message_id, *listed)
        # When they are through
        moderator.start()
        moderator.finish()
        # Then each has the scores that it has alone, and the action that the policy makes of them
        found = results(engine)
        assert set(found) == ids("one", 1) | ids("some", 30) | ids("many", 150)
        for message_id, listed in sent.items():
            for index, comment in enumerate(listed):
                result = found[f"{message_id}:{index}"]
                (alone,) = scorer.score_texts([comment["text"]])
                assert result.text == comment["text"]
                assert list(result.scores.values()) == pytest.approx(alone.tolist(), abs=1e-5)
                verdict = POLICY.decide("default", list(result.scores.values()))
                decided = (result.action, result.fired_label, result.fired_threshold)
                assert decided == (verdict.action, verdict.label, verdict.threshold)
        assert letters(engine) == {}

    def test_a_row_says_everything_about_its_comment(self, scorer: Scorer, engine: Engine) -> None:
        # Given a comment with every field, one with none, and one that must not be stored
        whole = {
            "text": f"{MARKER} " + "word " * 200,
            "id": 7,
            "community": "news",
            "author": "me",
            "language": "en",
            "created_at": "2026-11-22T12:00:00+02:00",
            "context": {"thread": [1, None]},
            "idempotency_key": "k",
        }
        secret_text = f"{MARKER} secret"
        before = datetime.now(UTC)
        moderator = Moderator(scorer, engine)
        moderator.deliver("m", whole, {"text": f"{MARKER} plain"}, {"text": secret_text, "store_text": False})
        moderator.start()
        moderator.finish()
        # Then the first one's row has all of it
        found = results(engine)
        row = found["news/k"]
        assert (row.comment_id, row.community, row.author, row.language) == ("7", "news", "me", "en")
        assert row.created_at == datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
        assert row.context == {"thread": [1, None]}
        assert (row.text, row.truncated, row.windows) == (
            whole["text"],
            False,
            len(scorer.encode([str(whole["text"])])[0]),
        )
        assert (row.model_version, row.policy_version) == ("tiny-1", POLICY.version)
        assert row.queue_ms >= 0 < row.compute_ms
        assert before <= row.submitted_at <= row.decided_at <= datetime.now(UTC)
        # And the second one's what follows where nothing was said
        row = found["m:1"]
        assert (row.comment_id, row.community, row.author, row.truncated) == ("m:1", "default", None, False)
        # And the third one's text is known by its hash only
        assert found["m:2"].text is None
        assert found["m:2"].text_sha256 == hashlib.sha256(secret_text.encode()).hexdigest()
        # And the policy that decided can be read
        with reading(engine) as connection:
            stored = connection.execute(text("SELECT policy_version, text FROM policies")).all()
        assert stored == [(POLICY.version, POLICY.text)]

    def test_a_refused_comment_and_its_neighbours_settle_one_message(self, scorer: Scorer, engine: Engine) -> None:
        # Given a message of good and bad comments, and one of bad comments only
        moderator = Moderator(scorer, engine)
        moderator.deliver("mixed", {"text": ""}, {"text": f"{MARKER} good"}, {"text": MARKER, "id": ""})
        moderator.deliver("bad", {"text": ""})
        moderator.start()
        moderator.finish()
        # Then both are acknowledged, with a row or a letter for each comment
        assert set(results(engine)) == {"mixed:1"}
        assert {key: letter.reason for key, letter in letters(engine).items()} == dict.fromkeys(
            map(refused_id, ["mixed:0", "mixed:2", "bad:0"]), "invalid_comment"
        )

    def test_a_line_of_the_log_for_each_refusal_and_each_forward_pass(
        self, scorer: Scorer, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        moderator = Moderator(scorer, engine)
        moderator.deliver("m", {"text": f"{MARKER} good"}, {"text": MARKER, "id": ""})
        with caplog.at_level("DEBUG", "worker.pipeline"):
            moderator.start()
            moderator.finish()
        lines = [vars(record) for record in caplog.records if record.name == "worker.pipeline"]
        # Then they name what they are about in fields of their own, and never the text
        [refusal] = [line for line in lines if "submission_id" in line]
        assert (refusal["submission_id"], refusal["reason"]) == (refused_id("m:1"), "invalid_comment")
        [batch] = [line for line in lines if "batch_id" in line]
        assert (batch["batch_id"], batch["version"], batch["texts"]) == (1, scorer.version, 1)
        assert MARKER not in caplog.text

    def test_a_redelivered_message_changes_nothing(self, scorer: Scorer, engine: Engine) -> None:
        moderator = Moderator(scorer, engine)
        moderator.start()
        moderator.deliver("m", {"text": f"{MARKER} good"}, {"text": ""})
        moderator.finish()
        first = results(engine), letters(engine)
        moderator.deliver("m", {"text": f"{MARKER} good"}, {"text": ""})
        moderator.finish()
        assert (results(engine), letters(engine)) == first
        # And what was decided before is not counted again
        assert moderator.pipeline.counters().decisions.total() == 1


class TestIdempotency:
    @pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one after the other"])
    def test_a_key_used_again_for_the_same_text_is_decided_once(
        self, scorer: Scorer, engine: Engine, together: bool
    ) -> None:
        moderator = Moderator(scorer, engine)
        self.deliver_twice(moderator, {"text": MARKER, "idempotency_key": "k"}, {"text": MARKER}, together)
        assert [result.text for result in results(engine).values()] == [MARKER]
        assert letters(engine) == {}

    @pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one after the other"])
    def test_a_key_used_again_for_another_text_is_set_aside(
        self, scorer: Scorer, engine: Engine, together: bool
    ) -> None:
        moderator = Moderator(scorer, engine)
        self.deliver_twice(moderator, {"text": MARKER, "idempotency_key": "k"}, {"text": f"{MARKER} edited"}, together)
        # Then the first one's decision stands
        assert [result.text for result in results(engine).values()] == [MARKER]
        # And the second one's producer hears of it, under an id that is not the first one's
        (letter,) = letters(engine).values()
        assert letter.reason == "idempotency_conflict"
        assert letter.dead_letter_id == id_of_text("k", letter.text_sha256 or "")
        assert b"edited" in letter.payload
        # And each is counted once, for what became of it
        counted = moderator.pipeline.counters()
        assert (counted.decisions.total(), dict(counted.dead_letters)) == (1, {"idempotency_conflict": 1})

    @staticmethod
    def deliver_twice(moderator: Moderator, first: dict[str, Any], changes: dict[str, Any], together: bool) -> None:
        if together:
            # Of like length, so that the order within the batch is that of delivery
            moderator.deliver("first", first)
            moderator.deliver("second", first | changes)
            moderator.start()
        else:
            moderator.start()
            moderator.deliver("first", first)
            moderator.finish()
            moderator.deliver("second", first | changes)
        moderator.finish()


class TestReuse:
    def test_a_flood_of_one_text_costs_one_forward_pass(self, scorer: Scorer, engine: Engine) -> None:
        # Given an engine that counts what it is given
        counting, scored = counting_scorer(scorer)
        moderator = Moderator(counting, engine)
        # When the same text comes a hundred times at once, also as its look-alike, and again later, beside another one
        spam, look_alike = f"{MARKER} BUY NOW", f"{MARKER} ＢＵＹ ＮＯＷ"
        moderator.deliver("flood", *[{"text": spam, "id": n} for n in range(99)], {"text": look_alike})
        moderator.start()
        moderator.finish()
        moderator.deliver("later", {"text": spam}, {"text": f"{MARKER} other"}, {"text": spam, "store_text": False})
        moderator.finish()
        # Then each is decided with its own row and its own text, by the same scores
        found = results(engine)
        assert set(found) == ids("flood", 100) | ids("later", 3)
        alike = [result for key, result in found.items() if key != "later:1"]
        assert len({tuple(result.scores.values()) for result in alike}) == 1
        assert found["flood:99"].text == look_alike
        assert found["later:2"].text is None
        # And the engine has seen it once
        assert scored == [scorer.encode([spam])[0][0], scorer.encode([f"{MARKER} other"])[0][0]]
        # And what was spared is counted
        stats = moderator.pipeline.stats()
        assert (stats["comments"], stats["duplicates"], stats["cache_hits"], stats["batches"]) == (103, 99, 2, 2)

    def test_another_version_scores_it_anew(
        self, scorer: Scorer, engine: Engine, tiny_version: Path, tmp_path: Path
    ) -> None:
        moderator = Moderator(scorer, engine)
        moderator.start()
        moderator.deliver("old", {"text": MARKER})
        moderator.finish()
        other, scored = counting_scorer(
            load_scorer(copy_version(tiny_version, tmp_path, "tiny-2"), device="cpu", threads=1)
        )
        moderator.pipeline.exchange(other)
        moderator.deliver("new", {"text": MARKER})
        moderator.finish()
        assert len(scored) == 1
        assert {key: result.model_version for key, result in results(engine).items()} == {
            "old:0": "tiny-1",
            "new:0": "tiny-2",
        }

    def test_nothing_is_reused_where_that_is_switched_off(self, scorer: Scorer, engine: Engine) -> None:
        counting, scored = counting_scorer(scorer)
        moderator = Moderator(counting, engine, reuse_texts=0)
        moderator.deliver("m", *[{"text": MARKER}] * 5)
        moderator.start()
        moderator.finish()
        moderator.deliver("again", {"text": MARKER})
        moderator.finish()
        assert len(scored) == 6

    def test_poison_is_set_aside_for_each_comment_that_holds_it(self, scorer: Scorer, engine: Engine) -> None:
        moderator = Moderator(poisoned(scorer, "engine raises"), engine)
        moderator.deliver("m", {"text": POISON}, {"text": MARKER}, {"text": POISON})
        moderator.start()
        moderator.finish()
        moderator.deliver("later", {"text": POISON})
        moderator.finish()
        assert set(results(engine)) == {"m:1"}
        assert set(letters(engine)) == {"m:0", "m:2", "later:0"}


class TestLongTexts:
    def test_the_row_says_in_how_many_windows_a_text_was_scored(self, scorer: Scorer, engine: Engine) -> None:
        # Given a text of many windows among short ones
        long_text = f"{MARKER} " + " ".join(text["text"] for text in comments(8))
        moderator = Moderator(scorer, engine)
        moderator.deliver("m", *comments(20), {"text": long_text}, *comments(20, 20))
        moderator.start()
        moderator.finish()
        # Then its scores are those of its worst windows
        found = results(engine)
        windows = scorer.encode([long_text])[0]
        worst = np.max([scorer.engine.score([ids])[0] for ids in windows], axis=0)
        assert found["m:20"].windows == len(windows) > 5
        assert list(found["m:20"].scores.values()) == pytest.approx(worst.tolist(), abs=1e-5)
        # And where it is alone, its time is that of all forward passes, each counted once
        before_ms = moderator.pipeline.counters().score.sum_s * 1000
        moderator.deliver("alone", {"text": f"{long_text} again"})
        moderator.finish()
        passes_ms = moderator.pipeline.counters().score.sum_s * 1000 - before_ms
        assert results(engine)["alone:0"].compute_ms == pytest.approx(passes_ms)

    def test_a_text_of_which_only_the_beginning_is_read_is_reviewed_at_least(
        self, scorer: Scorer, engine: Engine
    ) -> None:
        # Given two texts that normalisation makes too long, alike as far as they are read, and an ordinary one
        cut = "\ufdfa" * 6_800
        mild = wrapped(scorer, after=lambda token_ids, scores: scores.fill(0.0))
        moderator = Moderator(mild, engine)
        moderator.start()
        moderator.deliver("m", {"text": cut}, {"text": f"{cut}!"}, *comments(1))
        moderator.finish()
        # When their scores, known by now, come again
        moderator.deliver("again", {"text": cut})
        moderator.finish()
        # Then nobody is allowed on the beginning alone, by no rule that would not have fired
        found = results(engine)
        for submission_id in ("m:0", "m:1", "again:0"):
            row = found[submission_id]
            assert (row.truncated, row.action, row.fired_label, row.fired_threshold) == (True, "review", None, None)
            assert row.windows == len(scorer.encode([cut])[0]) > 1
        assert (found["m:2"].truncated, found["m:2"].action) == (False, "allow")
        # And each has the hash of its own text, and none the other's scores by mistake
        assert found["m:0"].text_sha256 != found["m:1"].text_sha256
        assert moderator.pipeline.stats()["cache_hits"] == 1

    def test_texts_are_normalised_once_and_hold_up_no_lane(
        self, scorer: Scorer, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        normalised: list[str] = []

        def normalise(text: str) -> str:
            normalised.append(text)
            return text

        for module in ("worker.job", "model.text"):
            monkeypatch.setattr(f"{module}.normalise", normalise)
        moderator = Moderator(scorer, engine)
        moderator.start()
        # When comments come while the lanes' lock is held
        with moderator.pipeline._lock:
            moderator.deliver("m", *comments(20))
            wait_until(lambda: len(normalised) == 20, what="texts read without the lock")
        moderator.finish()
        # Then nothing was normalised again
        assert normalised == [comment["text"] for comment in comments(20)]

    def test_one_window_that_cannot_be_scored_sets_the_whole_text_aside_once(
        self, scorer: Scorer, engine: Engine
    ) -> None:
        # Given a text of several windows, of which two alike make the engine fail
        long_text = f"{MARKER} " + "word " * 600
        windows = scorer.encode([long_text])[0]
        assert windows.count(windows[2]) >= 2

        def fail(token_ids: Sequence[Sequence[int]]) -> None:
            if windows[2] in token_ids:
                raise RuntimeError

        moderator = Moderator(wrapped(scorer, before=fail), engine)
        moderator.deliver("m", *comments(3), {"text": long_text})
        moderator.start()
        moderator.finish()
        assert set(results(engine)) == ids("m", 3)
        assert set(letters(engine)) == {"m:3"}

    def test_a_short_text_does_not_wait_for_all_of_a_long_ones_windows(self, scorer: Scorer, engine: Engine) -> None:
        # Given an engine that is at work on a long text, and a short one that comes meanwhile
        order: list[int] = []
        at_work, may_go_on = threading.Event(), threading.Event()

        def wait(token_ids: Sequence[Sequence[int]]) -> None:
            order.append(max(map(len, token_ids)))
            at_work.set()
            assert may_go_on.wait(60)

        batching = replace(scorer.batching, max_batch_tokens=128)
        moderator = Moderator(replace(wrapped(scorer, before=wait), batching=batching), engine)
        moderator.start()
        moderator.deliver("long", {"text": f"{MARKER} " + "word " * 2_000})
        assert at_work.wait(60)
        moderator.deliver("short", {"text": MARKER})
        wait_until(lambda: moderator.pipeline.stats()["waiting"]["prepare"] == 0, what="preparation")
        may_go_on.set()
        moderator.finish()
        # Then it is among the first
        assert len(order) > 10
        assert min(order) in order[:4]


class TestUrgent:
    def test_interactive_comments_pass_the_others_by_without_starving_them(
        self, scorer: Scorer, engine: Engine
    ) -> None:
        # Given an engine that scores one comment at a time, and is at work while others come
        order: list[list[int]] = []
        at_work, may_go_on = threading.Event(), threading.Event()

        def wait(token_ids: Sequence[Sequence[int]]) -> None:
            order.extend(map(list, token_ids))
            at_work.set()
            assert may_go_on.wait(60)

        batching = replace(scorer.batching, max_batch_tokens=1)
        moderator = Moderator(replace(wrapped(scorer, before=wait), batching=batching), engine)
        ordinary = [f"{MARKER} ordinary {n}" for n in range(20)]
        urgent = [f"{MARKER} urgent {n}" for n in range(6)]
        moderator.start()
        moderator.deliver("first", {"text": MARKER})
        assert at_work.wait(60)
        moderator.deliver("ordinary", *[{"text": text} for text in ordinary])
        # When comments whose authors wait come last
        moderator.deliver("urgent", *[{"text": text} for text in urgent], queue=INTERACTIVE_QUEUE)
        wait_until(lambda: moderator.pipeline.stats()["waiting"]["score"] == 27, what="preparation")
        may_go_on.set()
        moderator.finish()
        # Then every other one is theirs, until none is left
        kinds = ["urgent" if ids in [scorer.encode([text])[0][0] for text in urgent] else "ordinary" for ids in order]
        assert kinds[1:13:2] == ["urgent"] * 6
        assert kinds[2:13:2] == ["ordinary"] * 6
        assert kinds[13:] == ["ordinary"] * 14


class TestTrouble:
    def test_batches_too_large_for_the_memory_go_on_in_parts(
        self, scorer: Scorer, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        # Given a device with memory for three comments at a time
        def run_out_of_memory(token_ids: Sequence[Sequence[int]]) -> None:
            if len(token_ids) > 3:
                raise MemoryError

        moderator = Moderator(wrapped(scorer, before=run_out_of_memory), engine)
        moderator.deliver("m", *comments(60))
        moderator.start()
        moderator.finish()
        # Then every comment is decided, with its own scores
        found = results(engine)
        assert set(found) == ids("m", 60)
        alone = scorer.score_texts([comment["text"] for comment in comments(60)])
        ours = [list(found[f"m:{index}"].scores.values()) for index in range(60)]
        assert np.abs(np.array(ours) - alone).max() < 1e-5
        assert letters(engine) == {}
        assert "(MemoryError); trying its halves" in caplog.text

    @pytest.mark.parametrize("trouble", ["engine raises", "scores are NaN", "tokenizer raises", "tokenizer loses it"])
    @pytest.mark.parametrize("store_text", [True, False])
    def test_one_poison_comment_is_set_aside_alone(
        self, scorer: Scorer, engine: Engine, trouble: str, store_text: bool
    ) -> None:
        # Given a scorer that cannot take one comment among thirty
        moderator = Moderator(poisoned(scorer, trouble), engine)
        moderator.deliver("m", *comments(17), {"text": POISON, "store_text": store_text}, *comments(12, 17))
        moderator.start()
        moderator.finish()
        # Then all others are decided, and each was scored once
        assert set(results(engine)) == ids("m", 30) - {"m:17"}
        others = scorer.encode([comment["text"] for comment in comments(29)])
        assert moderator.pipeline.stats()["tokens"] == sum(len(ids) for windows in others for ids in windows)
        # And it is kept as far as it may be, with the reason
        (letter,) = letters(engine).values()
        assert (letter.dead_letter_id, letter.reason) == ("m:17", "scoring_failed")
        assert "version tiny-1 could not score it" in letter.detail
        assert MARKER not in letter.detail
        assert (POISON.encode() in letter.payload) is store_text
        assert letter.payload_bytes > len(POISON)

    def test_a_row_that_the_database_refuses_does_not_take_its_batch_along(
        self, scorer: Scorer, engine: Engine
    ) -> None:
        # Given a database that takes no comments of one author
        refuse_author(engine, "unwelcome")
        moderator = Moderator(scorer, engine)
        moderator.deliver("m", *comments(5), {"text": MARKER, "author": "unwelcome"}, *comments(5, 5), {"text": ""})
        moderator.start()
        moderator.finish()
        # Then the others are recorded, and that one is set aside
        assert set(results(engine)) == ids("m", 11) - {"m:5"}
        found = letters(engine)
        assert {key: letter.reason for key, letter in found.items()} == {
            refused_id("m:5"): "recording_failed",
            refused_id("m:11"): "invalid_comment",
        }
        assert "the database refused its row (IntegrityError" in found[refused_id("m:5")].detail
        assert MARKER not in found[refused_id("m:5")].detail
        counted = moderator.pipeline.counters()
        assert (counted.decisions.total(), sum(counted.queue.counts)) == (10, 10)
        assert dict(counted.dead_letters) == {"recording_failed": 1, "invalid_comment": 1}

    def test_a_database_that_has_lost_rows_is_given_them_again(
        self, scorer: Scorer, engine: Engine, tiny_version: Path, tmp_path: Path
    ) -> None:
        # Given a worker that has decided by two policies, and tries a version beside the active one
        other = parse_policy("communities: {default: {toxic: {remove: 0.0}}}")
        shadow = load_scorer(copy_version(tiny_version, tmp_path, "v2"), device="cpu", threads=1)
        moderator = Moderator(scorer, engine)
        moderator.start()
        moderator.deliver("before", *comments(3))
        moderator.finish()
        moderator.pipeline.exchange_policy(other)
        moderator.deliver("by the other", *comments(3, 3))
        moderator.finish()
        # When its database is an older state of itself, as after a failover, where neither policies nor trial are known
        with writing(engine) as connection:
            for table in ("decisions", "submissions", "policies"):
                connection.exec_driver_sql(f"DELETE FROM {table}")
        moderator.pipeline.try_out(LiveTrial(7, 1.0, True, shadow))
        # Then no comment is blamed, whichever of the policies decides it, and what decided it can be read
        moderator.deliver("after", *comments(40, 6))
        moderator.finish()
        moderator.pipeline.exchange_policy(POLICY)
        moderator.deliver("by the first", *comments(3, 46))
        moderator.finish()
        assert set(results(engine)) == ids("after", 40) | ids("by the first", 3)
        assert letters(engine) == {}
        with reading(engine) as connection:
            stored = connection.execute(text("SELECT policy_version FROM policies")).scalars().all()
        assert set(stored) == {POLICY.version, other.version}

    @pytest.mark.parametrize("broken", ["engine", "policy", "acknowledgement"])
    def test_a_broken_pipeline_ends_its_process(self, tiny_version: Path, database_url: str, broken: str) -> None:
        # When an engine can score nothing any more, or a stage of the pipeline breaks
        worker = subprocess.run(
            [sys.executable, "-m", "tests.integration.broken_worker", str(tiny_version), database_url, broken, MARKER],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        # Then the process ends, and its supervisor sees how
        assert worker.returncode == EXIT_BROKEN, worker.stderr
        assert "this worker ends, and what it holds returns to the queue" in worker.stderr
        assert ("can no longer score anything" in worker.stderr) is (broken == "engine")
        # And nothing of the comment is in its log
        assert MARKER not in worker.stdout + worker.stderr
        # And no comment is blamed
        engine = open_database(database_url)
        assert letters(engine) == {}
        engine.dispose()


class TestExchange:
    def test_each_comment_is_decided_by_the_policy_of_its_time(self, scorer: Scorer, engine: Engine) -> None:
        # Given comments decided by one policy
        remove_all = parse_policy("communities: {default: {toxic: {remove: 0.0}}}")
        moderator = Moderator(scorer, engine)
        moderator.start()
        moderator.deliver("before", *comments(40))
        moderator.finish()
        # When another one takes over, and the same texts come again
        moderator.pipeline.exchange_policy(remove_all)
        moderator.deliver("after", *comments(40))
        moderator.finish()
        # Then each was decided by the policy that it names, whether it was scored or remembered
        found = results(engine)
        for message_id, policy in (("before", POLICY), ("after", remove_all)):
            for submission_id in ids(message_id, 40):
                row = found[submission_id]
                assert row.policy_version == policy.version
                assert row.action == policy.decide("default", list(row.scores.values())).action
        assert {found[each].action for each in ids("after", 40)} == {"remove"}
        assert moderator.pipeline.stats()["policy_version"] == remove_all.version
        # And both can be read
        with reading(engine) as connection:
            stored = connection.execute(text("SELECT policy_version, text FROM policies")).all()
        assert set(stored) == {(policy.version, policy.text) for policy in (POLICY, remove_all)}

    def test_what_was_prepared_is_scored_by_the_version_that_prepared_it(
        self, scorer: Scorer, engine: Engine, tiny_version: Path, tmp_path: Path
    ) -> None:
        # Given a version that is busy with its first batch, while others are prepared for it
        encoder, busy, may_go_on = CountingEncoder(scorer), threading.Event(), threading.Event()
        short = [{"text": f"{MARKER} {n}"} for n in range(130)]

        def wait(token_ids: Sequence[Sequence[int]]) -> None:
            busy.set()
            assert may_go_on.wait(60)

        moderator = Moderator(replace(wrapped(scorer, before=wait), text_encoder=encoder), engine)
        moderator.start()
        moderator.deliver("first", {"text": MARKER})
        assert busy.wait(60)
        moderator.deliver("old", *short)
        wait_until(lambda: encoder.texts == 131, what="preparation by the old version")
        # When a new version takes over, and more comments are prepared, so that both meet in one window
        new = load_scorer(copy_version(tiny_version, tmp_path, "tiny-2"), device="cpu", threads=1)
        new_encoder = CountingEncoder(new)
        moderator.pipeline.exchange(replace(new, text_encoder=new_encoder))
        moderator.deliver("new", *short)
        wait_until(lambda: new_encoder.texts == 130, what="preparation by the new version")
        may_go_on.set()
        moderator.finish()
        # Then each is decided once, by the version that prepared it
        versions = {key: result.model_version for key, result in results(engine).items()}
        old = ids("first", 1) | ids("old", 130)
        assert versions == dict.fromkeys(old, "tiny-1") | dict.fromkeys(ids("new", 130), "tiny-2")
        assert letters(engine) == {}


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_forward_passes_side_by_side_are_as_many_as_the_engine_wants(
    tiny_version: Path, tmp_path: Path, engine: Engine
) -> None:
    """Of the active version, after an exchange in either direction, and of one on trial beside it."""
    wide_version = copy_version(tiny_version, tmp_path, "wide")
    narrow, of_narrow = gauged(load_scorer(tiny_version, device="cpu", engine="torch", threads=1))
    wide, of_wide = gauged(load_scorer(wide_version, device="cpu", engine="onnx", threads=3))
    moderator = Moderator(narrow, engine, reuse_texts=0)
    moderator.start()
    lanes: list[int] = []
    sent: dict[str, list[dict[str, Any]]] = {}
    # Given comments that keep coming, so that there is always something prepared for the version before
    for message_id, active, candidate in (
        ("narrow", narrow, None),
        ("wide", wide, None),
        ("narrow again", narrow, None),
        ("wide on trial", narrow, LiveTrial(1, 0.5, False, wide)),
        ("narrow on trial", wide, LiveTrial(2, 0.5, False, narrow)),
    ):
        moderator.pipeline.exchange(active)
        moderator.pipeline.try_out(candidate)
        lanes.append(moderator.pipeline.stats()["lanes"])
        of_wide.expect_together(3 if wide in (active, candidate and candidate.scorer) else 0)
        sent[message_id] = comments(60, len(sent) * 60)
        moderator.deliver(message_id, *sent[message_id])
        # Until those of this version are being scored
        scored = of_wide if active is wide else of_narrow
        before = scored.passes
        wait_until(lambda scored=scored, before=before: scored.passes > before, what="its turn")  # type: ignore[misc]
    moderator.finish()
    # Then each engine had as many passes side by side as it wants, never more, and that is what is said
    assert lanes == [1, 3, 1, 1, 3]
    assert (of_narrow.most, of_wide.most) == (1, 3)
    # And every window was scored once, and every comment decided once
    windows = [ids for listed in sent.values() for each in narrow.encode([c["text"] for c in listed]) for ids in each]
    assert sorted(of_narrow.scored + of_wide.scored) == sorted(windows)
    assert set(results(engine)) == set().union(*(ids(message_id, 60) for message_id in sent))
    assert letters(engine) == {}


class Gauge:
    """How many forward passes are side by side in an engine, and what they score."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._together = threading.Barrier(1)
        self._waiting = self._at_work = 0
        self.passes = self.most = 0
        self.scored: list[list[int]] = []

    def expect_together(self, lanes: int) -> None:
        """The next passes wait for each other until so many have begun."""
        with self._lock:
            self._waiting, self._together = lanes, threading.Barrier(max(1, lanes))

    def begin(self, token_ids: Sequence[Sequence[int]]) -> None:
        with self._lock:
            self._at_work += 1
            self.passes += 1
            self.most = max(self.most, self._at_work)
            self.scored.extend(map(list, token_ids))
            waits, self._waiting = self._waiting > 0, max(0, self._waiting - 1)
        if waits:
            with suppress(threading.BrokenBarrierError):
                self._together.wait(20)

    def end(self, token_ids: Sequence[Sequence[int]], scores: Scores) -> None:
        with self._lock:
            self._at_work -= 1


def gauged(scorer: Scorer) -> tuple[Scorer, Gauge]:
    gauge = Gauge()
    single = replace(scorer.batching, max_batch_tokens=1)
    return replace(wrapped(scorer, before=gauge.begin, after=gauge.end), batching=single), gauge


class TestOutage:
    @pytest.fixture
    def database(self, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
        """An engine that soon notices that its database is away."""
        monkeypatch.setattr("db.session.BUSY_TIMEOUT_S", 0.05)
        monkeypatch.setattr("db.outage.FIRST_PAUSE_S", 0.02)
        monkeypatch.setattr("db.outage.LAST_PAUSE_S", 0.1)
        engine = open_database(database_url)
        yield engine
        engine.dispose()

    def test_decisions_wait_for_the_database(
        self, scorer: Scorer, database: Engine, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        # Given a database that goes away while comments come, in the middle of a day's work
        moderator = Moderator(scorer, database)
        moderator.start()
        moderator.deliver("before", *comments(3))
        moderator.finish()
        attempts: list[object] = []
        event.listen(database, "do_connect", lambda *args: attempts.append(args))
        event.listen(database.pool, "checkout", lambda *args: attempts.append(args))
        with outage(database_url):
            moderator.deliver("during", *comments(40, 3), {"text": ""})
            wait_until(lambda: moderator.pipeline.database_is_away, what="the outage being noticed")
            attempts.clear()
            wait_until(lambda: len(attempts) > 3, what="several attempts")
            moderator.deliver("later", *comments(20, 43))
            assert moderator.acknowledged == ["before"]
        # When it is back, everything is recorded
        moderator.finish()
        assert set(results(database)) == ids("before", 3) | ids("during", 40) | ids("later", 20)
        assert set(letters(database)) == {refused_id("during:40")}
        # And the log says once that it was away and once that it is back
        assert not moderator.pipeline.database_is_away
        assert caplog.text.count("the database cannot be written to (") == 1
        assert caplog.text.count("the database can be written to again") == 1

    def test_what_is_not_recorded_is_not_acknowledged(
        self, scorer: Scorer, database: Engine, database_url: str
    ) -> None:
        # Given a worker that is told to end while its database is away
        moderator = Moderator(scorer, database)
        moderator.start()
        with outage(database_url):
            moderator.deliver("m", *comments(1))
            wait_until(lambda: moderator.pipeline.database_is_away, what="the outage being noticed")
            moderator.pipeline.stop_waiting()
            # It takes the next only when it has given up on the first
            moderator.deliver("next", {"text": ""})
            wait_until(moderator.pipeline._finished.empty, what="the recorder giving up")
        moderator.deliver("last", {"text": ""})
        wait_until(lambda: "last" in moderator.acknowledged, what="the recorder going on")
        # Then the message is neither recorded nor acknowledged, and will be delivered again
        assert "m" not in moderator.acknowledged
        assert results(database) == {}


# --- Trouble makers ---


def poisoned(scorer: Scorer, trouble: str) -> Scorer:
    """The scorer, but it cannot take POISON."""
    poison = scorer.encode([POISON])[0][0]

    def fail(token_ids: Sequence[Sequence[int]]) -> None:
        if poison in token_ids:
            raise RuntimeError(f"CUDA error while reading {POISON}")

    def miscalculate(token_ids: Sequence[Sequence[int]], scores: Scores) -> None:
        scores[[ids == poison for ids in token_ids], 2] = np.nan

    if trouble == "tokenizer raises":
        return replace(scorer, text_encoder=FailingEncoder(scorer))
    if trouble == "tokenizer loses it":
        return replace(scorer, text_encoder=LosingEncoder(scorer))
    return wrapped(scorer, before=fail) if trouble == "engine raises" else wrapped(scorer, after=miscalculate)


class FailingEncoder(TextEncoder):
    def __init__(self, scorer: Scorer) -> None:
        self._encoder = scorer.text_encoder

    def encode_readable(self, texts: Sequence[str]) -> list[Windows]:
        if POISON in texts:
            raise ValueError(f"cannot split {POISON}")
        return self._encoder.encode_readable(texts)


def counting_scorer(scorer: Scorer) -> tuple[Scorer, list[Sequence[int]]]:
    """The scorer, and all that its engine is given."""
    scored: list[Sequence[int]] = []
    return wrapped(scorer, before=scored.extend), scored


class LosingEncoder(TextEncoder):
    def __init__(self, scorer: Scorer) -> None:
        self._encoder = scorer.text_encoder

    def encode_readable(self, texts: Sequence[str]) -> list[Windows]:
        return self._encoder.encode_readable([text for text in texts if text != POISON])


class CountingEncoder(TextEncoder):
    def __init__(self, scorer: Scorer) -> None:
        self._encoder = scorer.text_encoder
        self.texts = 0

    def encode_readable(self, texts: Sequence[str]) -> list[Windows]:
        encoded = self._encoder.encode_readable(texts)
        self.texts += len(texts)
        return encoded


def refuse_author(database: Engine, author: str) -> None:
    with writing(database) as connection:
        if connection.dialect.name == "sqlite":
            connection.execute(
                text(
                    f"CREATE TRIGGER refuse BEFORE INSERT ON submissions WHEN NEW.author = '{author}' "
                    "BEGIN SELECT RAISE(ABORT, 'refused'); END"
                )
            )
        else:
            connection.execute(text(f"ALTER TABLE submissions ADD CONSTRAINT refuse CHECK (author <> '{author}')"))


def test_labels_are_recorded_in_their_own_columns(scorer: Scorer, engine: Engine) -> None:
    # Given an engine that gives each label another score
    def number(token_ids: Sequence[Sequence[int]], scores: Scores) -> None:
        scores[:] = [0.1, 0.2, 0.3, 0.05, 0.15, 0.25]

    moderator = Moderator(wrapped(scorer, after=number), engine)
    moderator.deliver("m", {"text": MARKER})
    moderator.start()
    moderator.finish()
    with reading(engine) as connection:
        row = connection.execute(text(f"SELECT {', '.join(LABELS)} FROM decisions")).one()
    assert row == pytest.approx([0.1, 0.2, 0.3, 0.05, 0.15, 0.25])
