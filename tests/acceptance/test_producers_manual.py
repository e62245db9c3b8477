"""docs/producers.md: every example of it, run as it stands there, is decided."""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

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


def test_the_manual_lists_what_the_client_needs() -> None:
    # Given an interpreter without any distribution but those that the manual lists, and what they require
    _, _, paragraph = MANUAL.partition("## Python client\n")
    listed = re.findall(r"`([^`]+)`", paragraph.partition(" no more than\n")[2].partition(", at the")[0])
    allowed = _with_requirements(listed)
    by_module = {module: names for module, names in packages_distributions().items() if "moderato" not in names}
    refused = {module for module, names in by_module.items() if not allowed & {_plain(name) for name in names}}
    assert {"torch", "pandas"} <= refused
    # Then the client comes up on either database, and says what it says of one without tables
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(refused)!r}))\n"
        "from api_client.client import ModerationClient\n"
        "ModerationClient('redis://127.0.0.1:1/0', 'postgresql://127.0.0.1:1/x').close()\n"
        "import db.migrate\n"
        "print(*{name.partition('.')[0] for name, module in sys.modules.items() if module})"
    )
    imported = {_plain(name) for module in _run("python", script, "", "").split() for name in by_module.get(module, ())}
    # and each that is listed is needed
    assert {_plain(Requirement(each).name) for each in listed} <= imported


def _plain(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def _with_requirements(distributions: Iterable[str]) -> set[str]:
    """The distributions' names, and those of all that is installed with them."""
    found, open_ends = set[str](), [Requirement(each) for each in distributions]
    while open_ends:
        requirement = open_ends.pop()
        if (name := _plain(requirement.name)) in found:
            continue
        found.add(name)
        extras = {"", *requirement.extras}
        for each in map(Requirement, requires(name) or ()):
            if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                open_ends.append(each)
    return found


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
