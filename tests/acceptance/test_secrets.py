"""Where a comment's text may be found once it is decided: in the database where it may be stored, and nowhere else."""

import base64
import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Exchange
from kombu import Producer as KombuProducer
from sqlalchemy import text

from api_client.embedded import EmbeddedRedis
from config.identity import refused_id
from config.names import MODERATE_QUEUE, MODERATE_TASK, WORKER_CONTROL_EXCHANGE, Reason
from config.settings import ROOT
from db.session import reading, writing
from tests.acceptance.system import TIMEOUT_S, CeleryProcess, System
from tests.acceptance.test_bad_input import Intruder
from tests.services import wait_until

# Made anew each time: other tests write to the same server, and leave their words in its files.
HIDDEN = f"hidden{uuid4().hex}"
"""Stands in every text that must not be stored."""
STORED = f"stored{uuid4().hex}"
"""Stands in every other one."""
UNLUCKY = "unlucky"
"""The community whose rows the database refuses, quoting them where it can."""

REFUSING_TRIGGER = {
    "sqlite": [
        f"CREATE TRIGGER refuse BEFORE INSERT ON submissions WHEN NEW.community = '{UNLUCKY}' "
        "BEGIN SELECT RAISE(ABORT, 'refused'); END"
    ],
    "postgresql": [
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION USING MESSAGE = NEW.text, ERRCODE = '23514', DETAIL = NEW.text; END $$",
        "CREATE TRIGGER refuse BEFORE INSERT ON submissions FOR EACH ROW "
        f"WHEN (NEW.community = '{UNLUCKY}') EXECUTE FUNCTION refuse()",
    ],
}


class Producer:
    """Sends comments with a word in each text, and notes what must come of them."""

    def __init__(self, system: System, word: str, store_text: bool) -> None:
        self.decided: list[str] = []
        self.dead: dict[str, Reason] = {}
        self._redis = system.redis
        self._app = Celery(broker=system.broker_url, set_as_current=False)
        self._word = word
        self._stored = {"store_text": store_text}
        self._key = f"key of one whose text is {'stored' if store_text else 'hidden'}"

    def close(self) -> None:
        self._app.close()

    def comment(self, **fields: object) -> dict[str, object]:
        return {"text": f"{self._word} is fine {uuid4()}", **self._stored, **fields}

    def task(self, *comments: object) -> str:
        return str(self._app.send_task(MODERATE_TASK, [list(comments)], queue=MODERATE_QUEUE).id)

    def everything(self) -> None:
        """A sound comment, and one for each way to become a dead letter."""
        poison = self.comment(text=f"{self._word} is poison {uuid4()}")
        kinds = {
            Reason.SCORING_FAILED: poison,
            Reason.RECORDING_FAILED: self.comment(community=UNLUCKY),
            Reason.INVALID_COMMENT: self.comment(v=2),
            Reason.EXPIRED: self.comment(expires_at="2020-01-01T00:00:00Z"),
        }
        message_id = self.task(self.comment(idempotency_key=self._key), *kinds.values())
        self.decided.append(self._key)
        names = {reason: f"{message_id}:{place}" for place, reason in enumerate(kinds, start=1)}
        for reason in (Reason.RECORDING_FAILED, Reason.INVALID_COMMENT):  # which leave no submission
            names[reason] = refused_id(names[reason])
        names[Reason.TOO_MANY_COMMENTS] = refused_id(self.task(*[self.comment()] * 257))
        self.dead |= {name: reason for reason, name in names.items()}
        self._push(lambda envelope: {**envelope, "body": _coded(json.dumps([[[self.comment()]], {}, {}])[:-1])})
        # Of one that is not JSON by its own account nothing is read, also not what it says of storing.
        self._push(lambda envelope: {**envelope, "content-type": "text/plain"})
        self._push(lambda envelope: {**envelope, "headers": [self._word]})

    def conflict(self) -> None:
        """The decided comment's key with another text."""
        self.task(self.comment(idempotency_key=self._key))

    def with_addresses(self, listener: str, file: Path) -> None:
        """A sound comment in a message that names where to go and what to run next, wherever Celery knows to."""
        for number, address in enumerate((f"http://{listener}/", f"redis://{listener}/0", f"file://{file}", str(file))):
            key = f"{self._key}, with an address {number}"
            elsewhere = self._app.signature("elsewhere.task", [address], queue="elsewhere")
            self._app.send_task(
                MODERATE_TASK,
                [[self.comment(text=f"{self._word} {address}", context={"url": address}, idempotency_key=key)]],
                queue=MODERATE_QUEUE,
                reply_to="elsewhere",
                link=elsewhere,
                link_error=elsewhere,
                chain=[elsewhere],
                chord=elsewhere,
                argsrepr=address,
                headers={"trace": address, "compression": None, "loader": address, "origin": address},
            )
            self.decided.append(key)

    def _push(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        queue = f"scratch-{uuid4()}"
        self._app.send_task(MODERATE_TASK, [[self.comment(), self.comment()]], queue=queue)
        envelope = json.loads(cast(bytes, self._redis.lpop(queue)))
        self._redis.lpush(MODERATE_QUEUE, json.dumps(change(envelope)))


def _coded(body: str) -> str:
    return base64.b64encode(body.encode()).decode()


UNREADABLE = 3
"""Messages of `everything` whose dead letters have no id known before."""


def holding(word: str, *paths: Path) -> list[Path]:
    """The files, in these folders too, that hold the word, plain or in base64."""
    # Where a word begins within three bytes decides how it looks in base64; the first and last characters also hold
    # bits of its neighbours.
    coded = [base64.b64encode(b" " * shift + word.encode())[shift + 1 : -4] for shift in range(3)]
    found = []
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and any(form in file.read_bytes() for form in (word.encode(), *coded)):
                found.append(file)
    return found


def database_files(system: System) -> list[Path]:
    """All that the database has written; nothing where its server is not on this machine."""
    if system.database.dialect.name == "sqlite":
        return [Path(str(system.database.url.database)).parent]
    with reading(system.database) as connection:
        connection.execute(text("CHECKPOINT"))
        directory = Path(connection.execute(text("SHOW data_directory")).scalar_one())
    return [directory] if directory.exists() else []


def test_texts_are_nowhere_but_where_they_may_be(
    own_redis: EmbeddedRedis, database_url: str, tiny_version: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with System(own_redis.url, database_url, tmp_path) as system:
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        with writing(system.database) as connection:
            for statement in REFUSING_TRIGGER[system.database.dialect.name]:
                connection.exec_driver_sql(statement)
        # Given texts that may be stored and texts that may not, sound ones and of every kind of dead letter
        with (
            ExitStack() as stack,
            closing(Producer(system, HIDDEN, False)) as hidden,
            closing(Producer(system, STORED, True)) as stored,
        ):
            hidden.everything()
            stored.everything()
            listener = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
            pipe = tmp_path / "pipe"
            os.mkfifo(pipe)
            stored.with_addresses(f"127.0.0.1:{listener.getsockname()[1]}", pipe)
            # When a worker that says all it can has dealt with them, and has told on the way what it was doing
            log = logs / "worker.log"
            app = "tests.acceptance.leaky_worker"
            with closing(CeleryProcess(app, MODERATE_QUEUE, "w1", system.environment, log, "DEBUG")) as worker:
                worker.wait_until_ready()
                system.wait_for_decisions(hidden.decided + stored.decided)
                hidden.conflict()
                stored.conflict()
                expected = {**hidden.dead, **stored.dead}
                letters = wait_until(
                    lambda: _at_least(len(expected) + 2 * (UNREADABLE + 1), system), TIMEOUT_S, "the dead letters"
                )
                # And a remote-control command comes as a pickle that acts when it is read
                intruded = tmp_path / "intruded"
                command_by_pickle(system, Intruder(intruded))
                worker.wait_for_log("Refusing to deserialize")
                assert not intruded.exists()
                assert system.client.nodes() == ([worker.node], [])
                worker.send_signal(signal.SIGUSR1)
                worker.wait_for_log("in _record")
                assert "LOCAL VARIABLES" not in worker.log()
                system.wait_until_nothing_is_left()
                # Then nothing that a message names was opened, and nothing was sent on
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.accept()
                with pytest.raises(OSError, match="No such device or address"):
                    os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # there is no reader
                assert "elsewhere" not in str(system.redis.keys("*"))
        assert {key: letters[key] for key in expected} == expected
        assert sorted(letters.values()).count(Reason.UNREADABLE_MESSAGE) == 2 * UNREADABLE
        assert holding(HIDDEN, own_redis.data), "the search finds nothing anywhere"
        system.redis.bgrewriteaof()
        wait_until(lambda: not _rewriting(system), TIMEOUT_S, "the append-only file's rewriting")

        # And no log holds any text
        assert holding(HIDDEN, logs, own_redis.log) == []
        assert holding(STORED, logs, own_redis.log) == []
        # And Redis' files none that may not be stored, nor the database's, nor what else the worker writes
        assert holding(HIDDEN, own_redis.directory) == []
        assert holding(HIDDEN, ROOT / "var") == []
        files = database_files(system)
        assert holding(STORED, *files) != [] or not files
        assert holding(HIDDEN, *files) == []


def command_by_pickle(system: System, command: object) -> None:
    with Celery(broker=system.broker_url, set_as_current=False) as app, app.connection_for_write() as broker:
        exchange = Exchange(f"{WORKER_CONTROL_EXCHANGE}.pidbox", type="fanout", durable=False)
        KombuProducer(broker).publish(command, exchange=exchange, declare=[exchange], serializer="pickle")


def _at_least(count: int, system: System) -> dict[str, str] | None:
    letters = {letter.dead_letter_id: letter.reason for letter in system.client.dead_letters(limit=1000)}
    return letters if len(letters) >= count else None


def _rewriting(system: System) -> bool:
    state = system.redis.info("persistence")
    return bool(state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])
