"""The command line as people run it: on a real Redis and SQLite, with a real version.

In processes of its own where signals, a terminal or what it leaves behind matter; else in this one.
"""

import csv
import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Engine
from typer.testing import Result

from api_client.client import ModerationClient
from bench.tiny import write_tiny_version
from cli.embedded_system import SHORTEST_LIFE_S
from cli.terminal import PLAIN_WIDTH, out
from cli.versions import MOST_LOADS
from config.names import INTERACTIVE_QUEUE, LABELS, MODERATE_QUEUES
from config.policy import parse_policy
from config.settings import ROOT
from db import policies, queries
from db.session import open_database, reading, writing
from db.trials import TrialScoreRow, record_trial_scores
from model.engine import load_scorer
from model.version import WEIGHTS_FILE
from tests.commands import run_here
from tests.integration.rows import NOON, decide, letter, minutes, scored
from tests.services import wait_until

VERSION = "tiny-1"
OTHER_POLICY = "communities: {default: {toxic: {hide: 0.95}}}"


class Moderato:
    """`moderato` with settings of its own."""

    def __init__(self, **variables: str) -> None:
        self.environment = os.environ | variables

    def __call__(self, *arguments: str, status: int = 0, stdin: str = "") -> Result:
        """Run a command to its end, which must be `status`, in this process."""
        return run_here(self.environment, *arguments, status=status, stdin=stdin)

    def apart(self, *arguments: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end, which must be `status`, in a process of its own."""
        command = [sys.executable, "-m", "cli.main", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return done

    def start(self, *arguments: str, ignoring: Sequence[signal.Signals] = ()) -> "subprocess.Popen[str]":
        """Start a command that goes on until it is stopped, where these signals were ignored before."""

        def ignore() -> None:
            for number in ignoring:
                signal.signal(number, signal.SIG_IGN)

        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=ignore,
        )


@pytest.fixture(scope="module")
def versions_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("versions")
    write_tiny_version(directory, VERSION)
    return directory


@pytest.fixture
def moderato(redis_url: str, sqlite_url: str, versions_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Moderato:
    """With an empty Redis, a database with tables, and one version on disk that the database does not know."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(out, "width", PLAIN_WIDTH)  # pytest itself may be on a terminal
    return Moderato(
        MODERATO_BROKER_URL=redis_url, MODERATO_DATABASE_URL=sqlite_url, MODERATO_VERSIONS_DIR=str(versions_dir)
    )


@pytest.fixture
def client(redis_url: str, sqlite_url: str) -> Iterator[ModerationClient]:
    with ModerationClient(redis_url, sqlite_url) as client:
        yield client


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class TestSubmitting:
    def test_texts(self, moderato: Moderato, client: ModerationClient) -> None:
        # When two texts are submitted
        done = moderato("submit", "one", "two")
        # Then their ids are on stdout, and one message waits
        first, second = done.stdout.split()
        assert (first[-2:], second[-2:]) == (":0", ":1")
        assert client.activity().queue_depths["toxicity"] == 1

    def test_a_csv(self, moderato: Moderato, client: ModerationClient, tmp_path: Path) -> None:
        # Given a CSV as spreadsheets write it, of more comments than one message holds
        rows = "".join(f'{n},"comment, {n}"\n' for n in range(100))
        (tmp_path / "c.csv").write_text(f"﻿key,body\n{rows}")
        done = moderato(
            "submit", "--file", str(tmp_path / "c.csv"), "--text-column", "body", "--id-column", "key", "--json"
        )
        assert len(json_lines(done.stdout)) == 100
        assert client.activity().queue_depths["toxicity"] == 2

    def test_a_file_again(self, moderato: Moderato, client: ModerationClient, tmp_path: Path) -> None:
        # Given a file that cannot be submitted to its end
        (tmp_path / "c.csv").write_text("id,text\n1,one\n2,two\n3,\n4,four\n")
        file = ["submit", "--file", str(tmp_path / "c.csv")]
        done = moderato(*file, status=1)
        assert "line 4" in done.stderr and "2 submitted" in done.stderr
        # When the same command passes over the bad row
        again = moderato(*file, "--skip-bad-rows")
        assert "3 submitted, 1 skipped" in again.stderr
        # Then the rows that went before have the names they had, so that they are decided once
        assert again.stdout.split()[:2] == done.stdout.split()
        # And who wants them to be new comments says so
        anew = moderato(*file, "--skip-bad-rows", "--again").stdout.split()
        assert len(anew) == 3 and not set(anew) & set(again.stdout.split())

    def test_another_queue(self, moderato: Moderato, client: ModerationClient) -> None:
        moderato("submit", "one", "--queue", "toxicity.bulk")
        assert client.activity().queue_depths == {"toxicity.interactive": 0, "toxicity": 0, "toxicity.bulk": 1}
        assert "'toxicity.bulk'" in moderato("submit", "two", "--queue", "toxicity.blk", status=1).stderr

    def test_json_lines_from_standard_input(self, moderato: Moderato) -> None:
        lines = '{"text": "one", "idempotency_key": "my-1"}\n\n"two"\n'
        done = moderato("submit", "--file", "-", stdin=lines)
        assert done.stdout.split()[0] == "my-1"
        assert len(done.stdout.split()) == 2

    def test_waits_while_the_queue_is_full(self, moderato: Moderato, client: ModerationClient, redis_url: str) -> None:
        # Given a queue that takes no more
        moderato.environment |= {"MODERATO_CLIENT__MAX_QUEUE_MESSAGES": "1"}
        client.submit("before")
        # When comments are submitted
        with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
            redis.config_resetstat()
            submitting = moderato.start("submit", "one", "--durable", "--json")
            wait_until(lambda: "cmdstat_eval" in redis.info("commandstats"), what="an attempt to submit")
            assert redis.llen("toxicity") == 1
            # Then that waits until a worker has made room
            redis.delete("toxicity")
            out, err = submitting.communicate(timeout=60)
            assert redis.llen("toxicity") == 1
        assert submitting.returncode == 0, err
        [line] = json_lines(out)
        # And --durable has kept it
        with reading(client._engine) as connection:
            assert queries.totals(connection).pending == 1
            assert queries.outcomes(connection, [line["submission_id"]]) == [None]


class TestReading:
    def test_results_show_no_comment_unless_asked(self, moderato: Moderato, sqlite_url: str) -> None:
        decide(sqlite_url, scored("a", text="mind your words", action="hide", fired_label="toxic", toxic=0.95))
        table = moderato("results").stdout
        assert "hide" in table and "toxic 0.95" in table
        assert "mind your words" not in table
        assert "mind your words" in moderato("results", "--text").stdout

    def test_ids_are_shown_whole_on_a_narrow_terminal(self, moderato: Moderato, sqlite_url: str) -> None:
        long_id = "01a22269-e97b-761f-9d25-7b9a8a6c1f3e:17"
        row = scored(long_id, comment_id="article 7", community="news", model_version="v" * 40)
        decide(sqlite_url, replace(row, action="hide", fired_label="toxic", toxic=0.95))
        moderato.environment |= {"COLUMNS": "80"}
        table = moderato.apart("results").stdout
        assert all(part in table for part in (long_id, "news", "hide", "0.95"))
        assert max(map(len, table.splitlines())) <= 80

    def test_no_stranger_steers_the_terminal(self, moderato: Moderato, sqlite_url: str) -> None:
        # Given a comment whose every name holds what sets a title, clears the screen, and begins a line of its own
        attack = "k\x1b]0;T\x07\x1b[2J\r\nforged: \x9b2J\u202e"
        names = {"comment_id": f"c{attack}", "author": f"a{attack}", "community": f"y{attack}"}
        decide(sqlite_url, scored(attack, text=attack, action="hide", **names), letters=[letter(f"l{attack}")])
        commands = (
            ["explain", attack],
            ["results", "--text"],
            ["review", "next"],
            ["review", attack, "--action", "allow"],
            ["dead-letters"],
            ["dead-letters", "show", f"l{attack}", "--payload"],
        )
        for command in commands:
            done = moderato(*command)
            shown = done.stdout + done.stderr
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown), command
            assert not re.search("^forged: ", shown, re.MULTILINE), command

    @pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
    def test_a_terminal_that_lacks_characters_gets_others(
        self, moderato: Moderato, sqlite_url: str, encoding: str
    ) -> None:
        decide(sqlite_url, scored("a", text="grün 🙂 naïve"))
        moderato.environment |= {"PYTHONIOENCODING": encoding}
        for command in ("results --text", "doctor"):
            done = subprocess.run(
                [sys.executable, "-m", "cli.main", *command.split()],
                cwd=ROOT,
                env=moderato.environment,
                capture_output=True,
                check=False,
            )
            assert b"Traceback" not in done.stderr and done.stdout, command

    def test_results_as_json_lines_with_filters(self, moderato: Moderato, sqlite_url: str) -> None:
        decide(sqlite_url, scored("a", action="hide"), scored("b", decided_at=minutes(1)))
        [row] = json_lines(moderato("results", "--action", "hide", "--json").stdout)
        assert (row["submission_id"], row["decided_at"]) == ("a", "2026-11-22T12:00:00+00:00")
        assert "text" not in row
        rows = json_lines(moderato("results", "--since", "2026-11-22T12:00:30", "--json", "--text").stdout)
        assert [(row["submission_id"], row["text"]) for row in rows] == [("b", "the text of b")]

    def test_following_ends_with_the_cursor_to_go_on_from(self, moderato: Moderato, sqlite_url: str) -> None:
        # Given a decision of yesterday, and one of an hour ago
        now = datetime.now(UTC)
        decide(sqlite_url, scored("old", decided_at=now - timedelta(days=1)))
        decide(sqlite_url, scored("early", action="hide", decided_at=now - timedelta(hours=1)))
        # When somebody follows from some hours ago, and another decision comes
        following = moderato.start("results", "--follow", "--since", "3h", "--json")
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["submission_id"] == "early"
        decide(sqlite_url, scored("late", action="hide"))
        row = json.loads(following.stdout.readline())
        assert (row["submission_id"], row["model_action"], "text" in row) == ("late", "hide", False)
        # and somebody overturns it
        moderato("review", "late", "--action", "allow", "--label", "toxic=0", "--reviewer", "ada")
        row = json.loads(following.stdout.readline())
        assert (row["type"], row["submission_id"], row["action"]) == ("comment.reviewed", "late", "allow")
        assert (row["model_action"], row["reviewer"], row["labels"]) == ("hide", "ada", {"toxic": False})
        # Then Ctrl-C ends it with where to go on
        following.send_signal(signal.SIGINT)
        rest, said = following.communicate(timeout=60)
        assert (following.returncode, rest) == (0, "")
        assert said == f"go on from here: moderato results --follow --after {row['cursor']}\n"
        # And from there the next ones come, in words
        decide(sqlite_url, scored("last", action="remove", fired_label="toxic", community="news"))
        following = moderato.start("results", "-f", "--after", row["cursor"], "--community", "news", "--text")
        assert following.stdout is not None
        assert re.search(r"last  remove +toxic 0\.10 +v1  the text of last", following.stdout.readline())
        moderato("review", "last", "--action", "hide", "--reviewer", "ada")
        moderato("erase", "--comment", "comment of last", "--yes")
        assert re.search(r"last  hide +by ada", following.stdout.readline())
        assert re.search(r"last  erased", following.stdout.readline())
        following.send_signal(signal.SIGINT)
        assert following.communicate(timeout=60)[0] == ""

    def test_a_review_holds(self, moderato: Moderato, sqlite_url: str, client: ModerationClient) -> None:
        decide(sqlite_url, scored("a", action="hide"))
        moderato("review", "a", "--action", "allow", "--label", "toxic=0", "--reviewer", "ada", "--note", "irony")
        row = client.result("a")
        assert row is not None
        assert (row.action, row.reviewer, row.note) == ("allow", "ada", "irony")

    def test_who_flips_labels_is_found(self, moderato: Moderato, sqlite_url: str, client: ModerationClient) -> None:
        # Given a comment that is called like a command, of which one reviewer says the opposite of what two say
        decide(sqlite_url, scored("agreement"))
        for name, word in ("ann", 1), ("bob", 1), ("[red]eve\n", 0):
            moderato("review", "--action", "hide", "agreement", "--label", f"toxic={word}", "--reviewer", name)
        # Then that one comes first, with least weight
        rows = json_lines(moderato("review", "agreement", "--json").stdout)
        assert [(row["name"], row["texts"], row["compared"], row["agreed"]) for row in rows] == [
            ("[red]eve\n", 1, 2, 0),
            ("ann", 1, 2, 1),
            ("bob", 1, 2, 1),
        ]
        assert 0 < rows[0]["weight"] < rows[1]["weight"] < 1
        shown = moderato("review", "agreement").stdout
        assert "[red]eve │" in shown and "50.0%" in shown

    def test_a_policy_is_tried_on_stored_scores_and_activated(
        self,
        moderato: Moderato,
        client: ModerationClient,
        sqlite_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Given decisions of two communities, one of them reviewed, and a policy that nobody activated
        mild, strict = tmp_path / "mild.yaml", tmp_path / "strict.yaml"
        mild.write_text("communities: {default: {toxic: {hide: 0.9}}, kids: {inherits: news}, news: {}}")
        strict.write_text("communities: {default: {toxic: {review: 0.4, hide: 0.9}}, news: {toxic: {remove: 0.7}}}")
        now = datetime.now(UTC)
        decide(
            sqlite_url,
            *(scored(f"s{n}", toxic=n / 10, decided_at=now - timedelta(hours=n)) for n in range(9)),
            scored("n", community="news", toxic=0.8, decided_at=now, text="mind\x1b your words"),
            scored("old", toxic=0.8, decided_at=now - timedelta(days=3)),
        )
        client.review("s8", action="remove", reviewer="ann")
        moderato.environment["MODERATO_POLICY_FILE"] = str(mild)
        # When it is tried, then the changes are counted, with examples, and nothing is changed
        told = json.loads(moderato("policy", "replay", str(strict), "--since", "1d", "-n", "2", "--json").stdout)
        assert (told["decisions"], told["changed"]) == (10, 6)
        assert told["actions"] == {"allow": {"allow": 4, "review": 5, "remove": 1}}
        assert told["communities"]["news"] == {"allow": {"remove": 1}}
        [review, remove] = sorted(told["examples"], key=lambda each: len(each["examples"]), reverse=True)
        assert [each["submission_id"] for each in review["examples"]] == ["s4", "s5"]  # the newest
        assert (remove["from"], remove["to"]) == ("allow", "remove")
        [example] = remove["examples"]
        assert example["after"] == {"action": "remove", "label": "toxic", "threshold": 0.7}
        assert example["scores"]["toxic"] == 0.8 and "text" not in example
        shown = moderato("policy", "replay", str(strict), "--since", "all", "--community", "news", "--texts").stdout
        assert "1 of 1 decisions (100.00%) would be others" in shown and "mind your words" in shown
        assert "mind" not in moderato("policy", "replay", str(strict)).stdout
        # And it is said what differs from the file that decides now, and who never submitted a comment
        done = moderato("policy", "diff", "active", str(strict))
        assert "no policy was ever activated" in done.stderr
        assert "hide 0.9 " in done.stdout and "review 0.4, hide 0.9" in done.stdout
        assert "community 'kids' never submitted a comment" in moderato("policy", "check", str(mild)).stderr
        # When it is activated after a question, then it is the active one
        for answer in ("n\n", ""):  # no, or nobody to ask
            moderato("policy", "activate", str(strict), stdin=answer, status=1)
        assert "ever activated" in moderato("policy", "history").stderr
        # And not where somebody else activates one before the answer
        with monkeypatch.context() as patch:
            patch.setattr(
                "typer.confirm",
                lambda *_, **__: client.activate_policy(OTHER_POLICY, instead_of=None, by="bob", reason="mine"),
            )
            assert "by bob" in moderato("policy", "activate", str(strict), status=1).stderr
        done = moderato("policy", "activate", str(strict), "--by", "ann", "--reason", "why", stdin="y\n")
        assert "no worker answers" in done.stderr
        version = parse_policy(strict.read_text()).version
        shown = moderato("policy", "show").stdout
        assert version in shown and "by ann: why" in shown
        assert "nothing was changed" in moderato("policy", "activate", version[:6], "--yes").stderr
        # And texts go back and forth, by their hashes too
        assert moderato("policy", "show", "--text").stdout == strict.read_text()
        moderato("policy", "activate", str(mild), "--yes")
        moderato("policy", "rollback", "--reason", "nobody to ask", status=1)
        moderato("policy", "rollback", "--reason", "too mild", stdin="y\n")
        moderato("policy", "rollback", "--reason", "too mild too", "--yes", status=1)
        rows = json_lines(moderato("policy", "history", "--json").stdout)
        assert [(row["policy_version"] == version, row["reason"]) for row in rows] == [
            (True, "too mild"),
            (False, "by hand"),
            (True, "why"),
            (False, "mine"),
            (False, "decided before, by a worker's policy file"),
        ]
        told = json.loads(moderato("policy", "diff", version[:8], "active", "--json").stdout)
        assert told == {"a": version, "b": version, "changes": []}
        assert f"policy        {version[:12]}, by " in moderato("status", status=1).stdout
        # And what people said of decisions stands
        result = client.result("s8")
        assert result is not None
        assert (result.action, result.reviewer) == ("remove", "ann")
        # And where the active one is of a newer release, it is shown as far as it goes, and can be replaced
        with writing(client._engine) as connection:
            newer, active = "communities: {default: {toxic: {ban: 1}}}", policies.active(connection)
            policies.activate(connection, newer, instead_of=active, by="newer", reason="better", now=now)
        assert "cannot be read by this release: communities.default.toxic names" in moderato("policy", "show").stdout
        assert json.loads(moderato("policy", "show", "--json").stdout)["communities"] is None
        assert "'ban'" in moderato("policy", "activate", str(mild), "--yes").stderr
        # And a name of nothing is one line
        assert "neither a file nor `active`" in moderato("policy", "show", "absent.yaml", status=1).stderr

    def test_what_to_review_next(self, moderato: Moderato, sqlite_url: str) -> None:
        # Given decisions of a policy that this release cannot read, and later of ours
        decide(sqlite_url, scored("calm"), scored("$(rm)", text="mind\x1b your words", threat=0.91, action="hide"))
        policy = (ROOT / "config" / "policy.yaml").read_text(encoding="utf-8")
        engine = open_database(sqlite_url)
        with writing(engine) as connection:
            version = policies.store(connection, policy, now=minutes(0))
            queries.record_decisions(connection, [scored("close", toxic=0.48, policy_version=version)])
        engine.dispose()
        # Then those that a word tells most of come first, with the reason and the way to answer
        done = moderato("review", "next", "-n", "2")
        assert "threat 0.91" in done.stdout and "mind your words" in done.stdout
        assert "toxic 0.48, 0.02 below label at 0.50" in done.stdout
        assert "calm" not in done.stdout
        assert "moderato review '$(rm)' --action" in done.stderr
        [severe, close, _] = json_lines(moderato("review", "next", "--json").stdout)
        assert (severe["submission_id"], severe["threat"], severe["reasons"]) == ("$(rm)", 0.91, ["threat 0.91"])
        assert (close["text"], close["shadow"]) == ("the text of close", None)
        # And none of another community
        assert "none of the newest 7 decisions" in moderato("review", "next", "--community", "x", "--among", "7").stderr

    def test_a_review_of_nothing_is_one_line(self, moderato: Moderato) -> None:
        done = moderato("review", "nobody", "--action", "allow", status=1)
        assert done.stderr == "moderato: submission 'nobody' has no decision to review\n"

    def test_dead_letters_show_the_reason_and_never_the_payload(self, moderato: Moderato, sqlite_url: str) -> None:
        decide(sqlite_url, letters=[letter("gone")])
        assert "text is empty" in moderato("dead-letters").stdout
        assert moderato("dead-letters", "purge", "--reason", "invalid_comment", "--dry-run").stderr.endswith("1\n")
        [row] = json_lines(moderato("dead-letters", "--json").stdout)
        assert row["dead_letter_id"] == "gone"
        assert "payload" not in row

    def test_an_erasure_asks_first_and_says_what_it_cannot_reach(self, moderato: Moderato, sqlite_url: str) -> None:
        decide(sqlite_url, scored("a", comment_id="7", author="ann", text="mind your words"), letters=[letter("b")])
        # When it is not confirmed, then nothing is erased
        asked = moderato("erase", "--author", "ann", stdin="n\n", status=1).stderr
        assert "the texts of 1 submissions; 0 dead letters' payloads" in asked
        moderato("erase", "--author", "ann", "--dry-run")
        moderato("erase", "--author", "ann", status=1)  # nobody is there to answer
        assert "mind your words" in moderato("results", "--text").stdout
        # When it is, then the text is gone, and what may be elsewhere is named
        told = moderato("erase", "--author", "ann", "--reason", "asked for", stdin="y\n").stderr
        assert "mind your words" not in moderato("results", "--text").stdout
        assert all(place in told for place in ("queue", "notes", "versions", "backups"))
        assert "nothing of this author is in the database" in moderato("erase", "--author", "ann", "--yes").stderr
        assert "either --comment-id ID or --author NAME" in moderato("erase", "--yes", status=1).stderr

    def test_a_comments_id_means_that_of_one_community(self, moderato: Moderato, sqlite_url: str) -> None:
        # Given an id that two communities use, and one that a single one uses
        of_news = [scored("a", comment_id="7", community="news"), scored("c", comment_id="8", community="news")]
        decide(sqlite_url, *of_news, scored("b", comment_id="7", community="sport"))
        # Then whoever leaves the community out is asked for it, and nothing is erased
        for command in ["explain"], ["erase", "--yes"]:
            assert "'news', 'sport'" in moderato(*command, "--comment-id", "7", status=1).stderr
        assert len(moderato("results", "--text", "--json").stdout.split("the text of")) == 4
        # But where there is one it is that
        [explained] = json_lines(moderato("explain", "--comment", "8", "--json").stdout)
        assert explained["submission_id"] == "c"
        moderato("erase", "--comment-id", "8", "--yes")
        moderato("erase", "--comment-id", "7", "--community", "sport", "--yes")
        kept = [
            row["submission_id"] for row in json_lines(moderato("results", "--text", "--json").stdout) if row["text"]
        ]
        assert kept == ["a"]

    def test_status_as_json(self, moderato: Moderato, redis_url: str, sqlite_url: str) -> None:
        # Without a worker a script must see it
        [state] = json_lines(moderato("status", "--json", status=1).stdout)
        assert state["broker_url"] == redis_url
        assert state["database_url"] == sqlite_url
        assert (state["workers"], state["queue_depths"]["toxicity"], state["active"]) == ([], 0, None)
        assert (state["pipelines"], state["rates"]) == ({}, {})

    def test_watching_on_a_terminal_writes_over_what_it_wrote(self, moderato: Moderato) -> None:
        # Given a terminal
        terminal, inside = pty.openpty()
        command = [sys.executable, "-m", "cli.main", "status", "--watch", "--interval-s", "1"]
        watching = subprocess.Popen(
            command, cwd=ROOT, env=moderato.environment | {"TERM": "xterm"}, stdin=inside, stdout=inside, stderr=inside
        )
        os.close(inside)
        # When it has shown the queues twice
        seen = b""
        while seen.count(b"toxicity.bulk 0") < 2:
            seen += os.read(terminal, 65_536)
        # Then the cursor went back up to the first line between the two
        assert b"\x1b[1A" in seen.partition(b"toxicity.bulk 0")[2]
        # And Ctrl-C ends it
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
        os.close(terminal)

    def test_status_without_a_broker_says_so_and_tells_the_rest(self, sqlite_url: str) -> None:
        moderato = Moderato(MODERATO_BROKER_URL="redis://:secret@127.0.0.1:1/0", MODERATO_DATABASE_URL=sqlite_url)
        done = moderato("status", status=1)
        assert "decisions" in done.stdout
        assert "moderato: the broker redis://:***@127.0.0.1:1/0 cannot be used" in done.stderr


class TestVersions:
    def test_a_version_on_disk_is_registered_when_it_is_activated(self, moderato: Moderato, sqlite_url: str) -> None:
        # Given a version that was copied into the versions directory, which is listed as not used yet
        [listed] = json_lines(moderato("models", "--json").stdout)
        assert (listed["versions"], listed["unregistered"]) == ([], [VERSION])
        assert VERSION in moderato("models").stdout
        moderato("activate", VERSION, "--reason", "first")
        # Then it is listed with its figures, and who activated it
        [listed] = json_lines(moderato("models", "--json").stdout)
        assert [(row["version"], row["active"]) for row in listed["versions"]] == [(VERSION, True)]
        assert listed["versions"][0]["metrics"]["holdout_int8"]["rows"] == 120
        assert listed["activations"][0]["reason"] == "first"
        assert VERSION in moderato("models").stdout
        # And of the workers that loaded it, each under another name, the newest are listed
        activation_id = listed["activations"][0]["activation_id"]
        database = open_database(sqlite_url)
        with writing(database) as connection:
            for pod in [f"pod-{number:02}@here" for number in range(MOST_LOADS + 5)]:
                queries.record_load(
                    connection, activation_id=activation_id, worker=pod, version=VERSION, error=None, now=NOON
                )
        database.dispose()
        said = re.findall(r"pod-\d\d@here", moderato("models").stdout)
        assert said == [f"pod-{number:02}@here" for number in range(5, MOST_LOADS + 5)]

    def test_a_version_that_is_nowhere(self, moderato: Moderato) -> None:
        assert moderato("activate", "v9", status=1).stderr.startswith("moderato: version v9: there is no directory")

    def test_a_known_version_whose_copy_here_is_damaged(
        self, redis_url: str, sqlite_url: str, versions_dir: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(versions_dir / VERSION, tmp_path / VERSION)
        moderato = Moderato(
            MODERATO_BROKER_URL=redis_url, MODERATO_DATABASE_URL=sqlite_url, MODERATO_VERSIONS_DIR=str(tmp_path)
        )
        # Given that it was sound when it was activated first
        moderato("activate", VERSION)
        (tmp_path / VERSION / WEIGHTS_FILE).write_bytes(b"damaged")
        # When it is activated again
        said = moderato("activate", VERSION, status=1).stderr
        # Then that is refused before any worker has to
        assert said.startswith(f"moderato: version {VERSION}: {WEIGHTS_FILE} is damaged")
        assert len(json_lines(moderato("models", "--json").stdout)[0]["activations"]) == 1

    def test_what_no_gate_has_judged_is_asked_about_and_gone_back_from_once(
        self, moderato: Moderato, sqlite_url: str
    ) -> None:
        decide(sqlite_url)
        moderato("activate", "v1")
        moderato("rollback", "--yes", status=1)
        # Given a version that no gate has compared with the active one
        asked = moderato("activate", VERSION, status=1).stderr
        assert "120 held-out rows" in asked and "--yes" in asked
        moderato("activate", VERSION, stdin="n\n", status=1)
        moderato("activate", VERSION, stdin="y\n")
        moderato("activate", "v2", "--yes")
        # When two people go back from it
        moderato("rollback", status=1)  # nobody to ask
        assert f"{VERSION} is the active version again" in moderato("rollback", stdin="y\n").stderr
        assert "--to v1" in moderato("rollback", "--yes", status=1).stderr
        # Then only a name leads further back; what was active is not asked about again
        moderato("rollback", "--to", "v1", "--yes")
        moderato("activate", VERSION)
        [listed] = json_lines(moderato("models", "--json").stdout)
        assert [row["version"] for row in listed["activations"]] == [VERSION, "v1", VERSION, "v2", VERSION]

    def test_two_side_by_side(self, moderato: Moderato, sqlite_url: str, versions_dir: Path, tmp_path: Path) -> None:
        # Given a version by its name and one by its directory, and no comment
        pair = "starter-2", str(versions_dir / VERSION)
        done = moderato("models", "compare", *pair)
        assert "the figures only are compared" in done.stderr
        assert "measured on different rows" in done.stderr
        assert "ROC-AUC identity_hate" in done.stdout and "decided otherwise" not in done.stdout
        # Given three comments, two of the same text, and one whose text is gone
        insult = "You are a complete idiot and nobody wants you here."
        decide(
            sqlite_url,
            scored("a", text=insult, decided_at=minutes(3)),
            scored("b", text=insult, decided_at=minutes(2)),
            scored("c", text="Thank you for the dates.", decided_at=minutes(1)),
            replace(scored("erased", decided_at=minutes(4)), text=None),
        )
        # Then the newest of them that are stored are scored by both, and decided by the policy
        done = moderato("models", "compare", *pair, "-n", "2", "--most", "1")
        assert "of the newest 2 stored comments" in done.stdout
        assert done.stdout.count(insult) == 1 and "Thank you" not in done.stdout
        rows = "comment_text,toxic\nGood morning,0\nYou idiot,1\n"
        (tmp_path / "rows.csv").write_text(rows)
        done = moderato("models", "compare", *pair, "--holdout", str(tmp_path / "rows.csv"), "--json")
        told = json.loads(done.stdout)
        assert insult not in done.stdout
        assert (told["a"]["version"], told["a"]["figures"]["rows"], told["b"]["figures"]["rows"]) == ("starter-2", 2, 2)
        assert told["decisions"]["compared"] == 3
        starter = {each["action"]: each["before"] for each in told["decisions"]["growth"]}
        assert (starter["allow"], starter["hide"]) == (1, 2)
        assert {each["submission_id"] for each in told["decisions"]["most_changed"]} == {"a", "b", "c"}
        # And `models` alone still lists
        assert "starter-2" not in moderato("models").stdout


class TestTraining:
    def test_a_request_without_waiting(self, moderato: Moderato, client: ModerationClient) -> None:
        [run] = json_lines(moderato("retrain", "--set", "epochs=1", "--set", "max_rows=300", "--json").stdout)
        assert (run["state"], run["overrides"]) == ("requested", {"epochs": 1, "max_rows": 300})
        assert client.training_run(run["run_id"]) is not None

    def test_following_a_run_ends_with_its_verdict(self, moderato: Moderato, sqlite_url: str) -> None:
        # Given somebody who follows a run
        following = moderato.start("retrain", "--follow")
        engine = open_database(sqlite_url)

        def requested() -> list[queries.RunRow]:
            with engine.connect() as connection:
                return queries.runs(connection, 1)

        [run] = wait_until(requested, what="the requested run")
        # When it fails, as a trainer would write it
        with writing(engine) as connection:
            queries.finish_run(connection, run.run_id, state="failed", reason="no rows", now=minutes(1))
        engine.dispose()
        # Then the verdict is shown, and scripts can tell
        _, said = following.communicate(timeout=60)
        assert "the run failed and changed nothing: no rows" in said
        assert following.returncode == 1


class TestOffline:
    def test_scoring_adds_seven_columns_and_keeps_all_else(
        self, moderato: Moderato, versions_dir: Path, tmp_path: Path
    ) -> None:
        # Given a CSV with columns of its own, a text over two lines, an empty one, and more rows than one chunk
        source, target = tmp_path / "in.csv", tmp_path / "out.csv"
        cut = "\ufdfa" * 6_800  # of which only the beginning is read
        texts = ["You are right.", 'two\nlines, "quoted"', "", cut, *(f"comment {n}" for n in range(600))]
        with source.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("no", "body"), *((f"00{n}", text) for n, text in enumerate(texts))])
        # When it is scored
        moderato("score", str(source), str(target), "--text-column", "body", "--version", VERSION)
        # Then every row is there with what it had
        with target.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["no", "body", *LABELS, "action"]
        assert [(row["no"], row["body"]) for row in rows] == [(f"00{n}", text) for n, text in enumerate(texts)]
        # And has the scores that the version gives that text alone, but for the empty one
        expected = load_scorer(versions_dir / VERSION).score_texts(texts[:1])[0].tolist()
        assert [float(rows[0][label]) for label in LABELS] == pytest.approx(expected, abs=2e-5)
        assert rows[0]["action"] != ""
        assert rows[3]["action"] not in ("allow", "label")
        assert [rows[2][column] for column in (*LABELS, "action")] == [""] * 7
        # And nothing else was left behind
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != "") == ["in.csv", "out.csv"]

    def test_scoring_keeps_labels(self, moderato: Moderato, tmp_path: Path) -> None:
        # Given a labelled CSV as spreadsheets write it, in a file that a link leads to
        source, target, link = tmp_path / "in.CSV", tmp_path / "out.csv", tmp_path / "link"
        source.write_text("comment_text;toxic\nhello;1\n", encoding="utf-8-sig")
        target.touch(mode=0o600)
        link.symlink_to(target)
        # When it is scored without a word on columns, and with one
        moderato("score", str(source), str(link), "--version", VERSION)
        assert target.read_text(encoding="utf-8").startswith("\ufeffcomment_text;toxic;score_toxic;score_severe_toxic;")
        assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o600
        moderato("score", str(source), str(target), "--version", VERSION, "--prefix", "is_")
        assert "hello;1;0." in target.read_text(encoding="utf-8") and "is_action" in target.read_text(encoding="utf-8")
        # And no column is ever overwritten
        source.write_text("text,toxic,score_action\nhello,1,2\n")
        assert "'score_action'" in moderato("score", str(source), str(target), "--version", VERSION, status=1).stderr

    def test_scoring_into_pipes_and_archives(self, moderato: Moderato, tmp_path: Path) -> None:
        # Given JSON lines on standard input, of which one is none
        lines = '{"text": "grün", "more": [1]}\n[]\n{"text": ""}\n'
        wanted = ["--version", VERSION, "--skip-bad-rows"]
        # When they are scored to standard output, then to an archive and to a device
        done = moderato("score", "-", "-", *wanted, stdin=lines)
        first, second = json_lines(done.stdout)
        assert (first["text"], first["more"], second["action"]) == ("grün", [1], None)
        assert 0 < first["toxic"] < 1
        assert "line 2" in done.stderr
        moderato("score", "-", str(tmp_path / "out.csv.gz"), *wanted, stdin=lines)
        with gzip.open(tmp_path / "out.csv.gz", "rt", encoding="utf-8", newline="") as file:
            assert [row["more"] for row in csv.DictReader(file)] == ["[1]", ""]
        os.mkfifo(tmp_path / "fifo")
        with ThreadPoolExecutor() as pool:
            read = pool.submit((tmp_path / "fifo").read_bytes)
            moderato("score", "-", str(tmp_path / "fifo"), *wanted, stdin=lines)
            assert len(read.result().splitlines()) == 2
        assert (tmp_path / "fifo").is_fifo()

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            pytest.param("id,comment_text\n1,You are an idiot,\n", "in.csv, line 2", id="too many fields"),
            pytest.param("body\nhello\n", "no column 'comment_text'; it has 'body'", id="no column"),
            pytest.param(None, "in.csv cannot be read: No such file", id="no file"),
            pytest.param("text\nhello\n", "absent/out.csv cannot be written: No such file", id="no folder"),
        ],
    )
    def test_what_cannot_be_scored(self, moderato: Moderato, tmp_path: Path, content: str | None, named: str) -> None:
        # Given a version that is not there: it is not even looked for
        folder = tmp_path / ("absent" if "absent" in named else "")
        if content is not None:
            (tmp_path / "in.csv").write_text(content)
        version = VERSION if "line" in named else "absent"
        done = moderato("score", str(tmp_path / "in.csv"), str(folder / "out.csv"), "--version", version, status=1)
        assert named in done.stderr and ".part" not in done.stderr
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith((".part", "out.csv"))] == []

    def test_measuring_a_version(self, moderato: Moderato) -> None:
        done = moderato("evaluate", "samples/holdout.csv", "--version", VERSION, "--engine", "onnx", "--json")
        [figures] = json_lines(done.stdout)
        assert figures["version"] == VERSION
        assert 0 < figures["labels"]["toxic"]["roc_auc"] < 1
        low, high = figures["labels"]["toxic"]["intervals"]["roc_auc"]
        assert 0 < low < high < 1
        assert figures["slices"]["short"]["rows"] > 0
        assert figures["identities"]["any"]["rows"] > 0

    def test_measuring_in_words_with_the_worst_misses(self, moderato: Moderato, tmp_path: Path) -> None:
        # Given two files whose columns have other names
        for name, said in (("a.csv", "1"), ("b.csv", "0")):
            with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
                rows = [(f"comment {number} of {name}", said) for number in range(12)]
                csv.writer(file).writerows([("body", "target"), *rows])
        files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
        named = ["--version", VERSION, "--columns", "comment_text=body", "--columns", "toxic=target"]
        # When they are measured as one, under evasion too
        done = moderato("evaluate", *files, *named, "--robustness", "--misses", "3")
        # Then there are the figures, those of each spelling, and comments on the terminal
        for words in (
            "average precision",
            "at or above",
            "ROC-AUC of toxic",
            "ROC-AUC on 24 rows",
            "leetspeak",
            ".csv",
        ):
            assert words in done.stdout
        # And the advice that the rows give is a policy
        policy = parse_policy(moderato("evaluate", *files, *named, "--thresholds").stdout)
        assert policy.decide("default", [1.0] * 6).label == "toxic"
        # And a column that we have no name for is refused
        done = moderato("evaluate", *files, "--columns", "body=comment_text", status=1)
        assert "--columns body=comment_text must be OURS=THEIRS" in done.stderr and "comment_text=body?" in done.stderr

    def test_training_here_and_now(self, moderato: Moderato, versions_dir: Path, tmp_path: Path) -> None:
        # When the version is fine-tuned a little further into a directory of its own
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("trainer: {max_rows: 32, calibration_texts: 8, epochs: 7}")
        output = str(tmp_path / "tiny-2")
        options = ["--config", str(recipe), "--epochs", "1"]
        done = moderato.apart("train", "--name", "tiny-2", "--from", VERSION, "--output", output, *options)
        assert "average precision" in done.stdout
        # Then it is a version that scores
        scorer = load_scorer(tmp_path / "tiny-2")
        assert (scorer.version, scorer.manifest.parent) == ("tiny-2", VERSION)
        # And its settings are those of the file, but where an option says otherwise
        chosen = scorer.manifest.settings
        assert (chosen["max_rows"], chosen["calibration_texts"], chosen["epochs"]) == (32, 8, 1)
        # And the curve of its loss is a picture, TensorBoard's files stand beside, and no checkpoint is left
        assert (tmp_path / "tiny-2" / "training.png").read_bytes().startswith(b"\x89PNG")
        assert list((tmp_path / ".tensorboard" / "tiny-2").glob("events.*"))
        assert not list((tmp_path / ".training").iterdir())


class TestDatabase:
    def test_up_and_down(self, redis_url: str, empty_sqlite_url: str) -> None:
        moderato = Moderato(MODERATO_BROKER_URL=redis_url, MODERATO_DATABASE_URL=empty_sqlite_url)
        assert "run `moderato db upgrade`" in moderato("results", status=1).stderr
        moderato("db", "upgrade")
        moderato("results")
        moderato("db", "downgrade", "base", "--yes")
        assert "run `moderato db upgrade`" in moderato("results", status=1).stderr

    def test_a_revision_that_does_not_exist(self, moderato: Moderato) -> None:
        assert "was not changed" in moderato("db", "downgrade", "9999", "--yes", status=1).stderr


class TestRunningEverything:
    @pytest.fixture
    def running(self, moderato: Moderato) -> Iterator["subprocess.Popen[str]"]:
        """`moderato up`, started as by nohup in the background of a script, with worker and trainer answering."""
        moderato("activate", VERSION)
        process = moderato.start("up", ignoring=(signal.SIGINT, signal.SIGHUP))
        yield process
        process.kill()
        process.communicate()

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_stops_all_of_it(
        self,
        running: "subprocess.Popen[str]",
        moderato: Moderato,
        client: ModerationClient,
        number: signal.Signals,
        status: int,
    ) -> None:
        # Given the running system, which decides a comment after its terminal was closed, whichever queue it waits in
        wait_until(lambda: all(client.nodes()), timeout_s=120, what="worker and trainer")
        running.send_signal(signal.SIGHUP)
        [stats] = client.activity().pipelines.values()
        assert set(stats.queues or ()) == set(MODERATE_QUEUES)
        interactive = "submit", "hello", "--queue", INTERACTIVE_QUEUE
        [row] = json_lines(moderato(*interactive, "--wait", "--json").stdout)
        assert row["model_version"] == VERSION
        started = children(running.pid)
        assert len(started) >= 3  # worker, trainer, and the child of the trainer's pool
        # When the command is told to stop
        running.send_signal(number)
        # Then it says so by its status, and where everything is, and leaves no process behind
        _, said = running.communicate(timeout=60)
        assert moderato.environment["MODERATO_DATABASE_URL"] in said.splitlines()[-1]
        assert running.returncode == status
        wait_until(lambda: not any(map(is_running, started)), timeout_s=30, what="the end of every process")

    def test_status_tells_how_each_worker_does(
        self, running: "subprocess.Popen[str]", moderato: Moderato, client: ModerationClient
    ) -> None:
        # Given the running system, which has decided some comments, and somebody who watches it
        wait_until(lambda: all(client.nodes()), timeout_s=120, what="worker and trainer")
        moderato("submit", *map(str, range(50)), "--wait")
        watching = moderato.start("status", "--watch", "--interval-s", "1", "--json")
        assert watching.stdout is not None
        # Then the status counts them, since the start
        [state] = json_lines(moderato("status", "--json").stdout)
        [worker] = state["workers"]
        assert state["pipelines"][worker]["version"] == VERSION
        assert state["pipelines"][worker]["comments"] == 50
        assert state["rates"][worker]["comments_per_s"] > 0
        assert 0 < state["rates"][worker]["batch_fill"] <= 1
        assert sum(stage["ms_per_comment"] for stage in state["rates"][worker]["stages"].values()) > 0
        shown = moderato("status").stdout
        assert f"{worker} " in shown and "comments/s" in shown and "score" in shown
        # And who watches sees the rates of each interval: none now, and some again when more is submitted
        looks = map(json.loads, watching.stdout)
        speeds = (look["rates"][worker]["comments_per_s"] for look in looks if worker in look["rates"])
        assert next(speeds) > 0  # the first look is at the time since the start
        wait_until(lambda: next(speeds) == 0, what="an interval without comments")
        moderato("submit", *map(str, range(50, 100)))
        wait_until(lambda: next(speeds) > 0, what="an interval with comments")
        # Until Ctrl-C, which is how it ends
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=30)
        assert (watching.returncode, said) == (0, "")

    def test_a_worker_that_dies_is_started_again(
        self, running: "subprocess.Popen[str]", moderato: Moderato, client: ModerationClient
    ) -> None:
        # Given the running system, for long enough that a death is no failed start
        wait_until(lambda: all(client.nodes()), timeout_s=120, what="worker and trainer")
        [worker] = [pid for pid in children(running.pid) if "worker@" in Path(f"/proc/{pid}/cmdline").read_text()]
        started = time.monotonic()
        wait_until(lambda: time.monotonic() - started > SHORTEST_LIFE_S, what="the worker's age")
        # When its worker is killed
        os.kill(worker, signal.SIGKILL)
        # Then another one decides what comes
        assert json_lines(moderato("submit", "hello", "--wait", "--json").stdout)[0]["model_version"] == VERSION
        assert worker not in children(running.pid)

    def test_an_impatient_user_leaves_nothing_behind_either(
        self, running: "subprocess.Popen[str]", client: ModerationClient
    ) -> None:
        wait_until(lambda: all(client.nodes()), timeout_s=120, what="worker and trainer")
        started = children(running.pid)
        # When Ctrl-C is pressed again and again
        while running.poll() is None:
            running.send_signal(signal.SIGINT)
            try:
                running.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        # Then it ends by that: the last one may come when everything is stopped and Python itself is ending
        assert running.returncode in (130, -signal.SIGINT)
        wait_until(lambda: not any(map(is_running, started)), timeout_s=30, what="the end of every process")

    def test_a_worker_that_cannot_start_is_quoted(self, redis_url: str, sqlite_url: str, tmp_path: Path) -> None:
        # Given an active version whose files are nowhere
        decide(sqlite_url)
        moderato = Moderato(
            MODERATO_BROKER_URL=redis_url, MODERATO_DATABASE_URL=sqlite_url, MODERATO_VERSIONS_DIR=str(tmp_path)
        )
        moderato("activate", "v1")
        # Then the command says what the worker said, and ends
        done = moderato.apart("up", status=1)
        assert "moderato: the worker ended with status" in done.stderr
        assert "version v1: there is no directory" in done.stderr


def is_running(pid: int) -> bool:
    """Whether the process is there and not just waiting for its exit status to be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def children(pid: int) -> list[int]:
    """Every process below this one."""
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return below + [grandchild for child in below for grandchild in children(child)]


class TestTrials:
    """Each command on decisions that are written here; what workers make of a trial is tested elsewhere."""

    @pytest.fixture
    def database(self, sqlite_url: str, client: ModerationClient) -> Iterator[Engine]:
        """v1 is the active version."""
        decide(sqlite_url)
        client.activate("v1", instead_of=client.active(), by="me", reason="first")
        engine = open_database(sqlite_url)
        yield engine
        engine.dispose()

    def test_a_canary(self, moderato: Moderato, client: ModerationClient, database: Engine) -> None:
        # Given a canary of a version that is only on disk, which decided a comment and failed on another
        started = moderato("canary", "start", VERSION, "--share", "5", "--reason", "to see").stderr
        assert f"{VERSION} decides 5 % of the submissions beside v1" in started
        trial = client.live_trial()
        assert trial is not None
        now = trial.started_at
        with writing(database) as connection:
            queries.record_decisions(
                connection,
                [scored("c", model_version=VERSION, toxic=0.9, action="hide", decided_at=now)]
                + [scored(f"b{n}", decided_at=now) for n in range(3)],
            )
            record_trial_scores(
                connection, [TrialScoreRow(trial_id=1, submission_id="b0", error="RuntimeError", scored_at=now)]
            )
        # Then its status says how it does
        shown = moderato("canary", "status").stdout
        assert "to see" in shown
        assert "5.0% of the submissions asked for, 50.0% of what was decided went to it" in shown
        assert "1 of 2 it failed to score (50.0%, 1.0% allowed)" in shown
        assert "+0.8000" in shown
        assert "199 decisions are missing to judge the scores" in shown
        told = json.loads(moderato("canary", "status", "--json").stdout)
        assert (told["actual_share"], told["error_rate"], told["missing_decisions"]) == (0.5, 0.5, 199)
        assert told["shifts"][0] == {
            "name": "toxic",
            "candidate": pytest.approx(0.9),
            "active": pytest.approx(0.1),
            "difference": pytest.approx(0.8),
            "may_differ_by": None,
        }
        # And so do the commands on versions and on the system
        line = f"canary: {VERSION} decides 5 % of the submissions beside v1"
        assert line in moderato("models").stdout
        assert line in moderato("status", status=1).stdout
        # And another trial has to wait, whose names are not those of this one
        assert "a trial runs already" in moderato("ab", "start", "v2", status=1).stderr
        assert "no ab runs, but a trial of another kind: canary" in moderato("ab", "promote", status=1).stderr
        assert VERSION in moderato("canary", "promote", "v2", status=1).stderr
        # When it is stopped
        assert "v1 decides alone" in moderato("canary", "stop", "--reason", "enough seen").stderr
        assert "stopped at" in (shown := moderato("canary", "status").stdout)
        assert "enough seen" in shown

    def test_a_shadow(self, moderato: Moderato, client: ModerationClient, database: Engine) -> None:
        moderato("shadow", "start", "v2")
        assert "0 submissions compared" in moderato("shadow", "compare").stdout
        scores: dict[str, Any] = dict.fromkeys(LABELS, 0.5)
        with writing(database) as connection:
            queries.record_decisions(connection, [scored("a", text="mind your words")])
            record_trial_scores(
                connection,
                [TrialScoreRow(trial_id=1, submission_id="a", action="hide", scored_at=minutes(1), **scores)],
            )
        shown = moderato("shadow", "compare").stdout
        assert "1 actions would have been others (100.0%)" in shown
        assert "0.4800" in shown and "mind your words" not in shown
        assert "mind your words" in moderato("shadow", "compare", "--text").stdout
        told = json.loads(moderato("shadow", "compare", "--json").stdout)
        assert (told["actions"], told["changed"]) == ({"allow": {"hide": 1}}, 1)
        assert told["differences"] == [
            {"submission_id": "a", "action": "allow", "shadow_action": "hide", "most": pytest.approx(0.48)}
        ]
        moderato("shadow", "stop")
        assert client.live_trial() is None

    def test_an_ab_test(self, moderato: Moderato, client: ModerationClient, database: Engine) -> None:
        moderato("ab", "start", "v2")
        trial = client.live_trial()
        assert trial is not None and trial.share == 0.5
        with writing(database) as connection:
            rows = [scored(f"c{n}", model_version="v2", decided_at=trial.started_at) for n in range(10)]
            queries.record_decisions(connection, rows)
        for n in range(10):
            client.review(f"c{n}", action="hide" if n < 8 else "allow", reviewer="ann")
        assert "49.0% to 94.3%" in moderato("ab", "compare").stdout
        told = json.loads(moderato("ab", "compare", "--json").stdout)
        assert (told["candidate"]["overturned"], told["candidate"]["overturned_share"]) == (8, 0.8)
        assert (told["active"]["reviewed"], told["active"]["overturned_share"]) == (0, None)
        # When the candidate wins
        assert "v2 is the active version" in moderato("ab", "promote").stderr
        active = client.active()
        assert active is not None and active.version == "v2"
        assert client.live_trial() is None
