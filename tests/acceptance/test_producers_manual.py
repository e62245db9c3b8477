"""docs/producers.md: every example of it, run as it stands there, is decided."""

import re
import subprocess
import sys
from pathlib import Path

from api_client.embedded import redis_server_executable
from config.comment import Comment
from config.names import Reason
from config.settings import ROOT
from tests.acceptance.system import TIMEOUT_S, System

MANUAL = (ROOT / "docs" / "producers.md").read_text(encoding="utf-8")
BROKER, DATABASE = "redis://queue.example/0", "postgresql://app@db.example/moderato"


def test_every_example_is_decided(redis_url: str, sqlite_url: str, tiny_version: Path, tmp_path: Path) -> None:
    with System(redis_url, sqlite_url, tmp_path) as system:
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        system.start_worker()
        # When each example is run, on our servers
        examples = re.findall(r"```(\w+)\n(.*?)```", MANUAL, re.DOTALL)
        assert [language for language, _ in examples] == ["python", "python", "bash"]
        said = [_run(language, code, redis_url, sqlite_url) for language, code in examples]
        # Then the client's says what was decided
        by_client = [tuple(line.split()) for line in said[0].splitlines()]
        assert len(by_client) == 3
        assert set(by_client) <= {(result.submission_id, result.action) for result in system.decisions()}
        # And Celery's, and the one of any language, have the ids that the manual says
        ids = [*said[1].split(), "0d8f9a52-46f0-4f0e-9c39-6d9f5d4e2b11:0"]
        system.wait_for_decisions(ids)
        assert {result.comment_id for result in system.decisions()} >= {"42", "43", "44", "45", "46"}
        # And a comment of the contract of tomorrow is one to be retried, where one of today may say so
        key, later = system.client.submit_many([{"text": "a"}, {"text": "b", "v": 1}])
        system.wait_for_decisions([key, later])
        body = '[[[{\\"text\\": \\"c\\", \\"v\\": 2, \\"mood\\": \\"good\\"}]], {}, {}]'
        _run("bash", _in_the_manual(body, "tomorrow"), redis_url, sqlite_url)
        assert system.client.wait(["tomorrow:0"], timeout_s=TIMEOUT_S) == {"tomorrow:0": "dead"}
        letter = system.client.dead_letter("tomorrow:0")
        assert letter is not None and letter.reason == Reason.INVALID_COMMENT
        assert "'v' names a version of the contract that is not known here" in letter.detail
        assert "upgrade the workers" in letter.detail


def test_the_manual_names_every_field_of_a_comment() -> None:
    _, _, table = MANUAL.partition("## A comment\n")
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(Comment.model_fields)


def _in_the_manual(body: str, task_id: str) -> str:
    """The manual's message with another body and id."""
    (code,) = re.findall(r"```bash\n(.*?)```", MANUAL, re.DOTALL)
    code = re.sub(r'"body": ".*",', lambda _: f'"body": "{body}",', code)
    return re.sub(r'"id": "[0-9a-f-]{36}"', f'"id": "{task_id}"', code)


def _run(language: str, code: str, redis_url: str, database_url: str) -> str:
    """What an example prints."""
    socket = redis_url.removeprefix("redis+socket://")
    client = redis_server_executable().with_name("redis-cli")
    code = code.replace(f"redis-cli -u {BROKER}", f"{client} -s {socket}")
    code = code.replace(BROKER, redis_url).replace(DATABASE, database_url)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
