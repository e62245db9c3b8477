"""`moderato doctor`: whether what moderato needs is there and sound, and what to do where it is not."""

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from cli.checks import CHECKS, Check, Finding
from cli.terminal import print_json, print_line
from config.settings import Settings

SAID_COLUMN = 21
"""Where a finding's words begin, behind its part and level."""
STYLES = {"ok": "green", "warning": "yellow", "problem": "red", "unknown": "dim"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: ok, and the findings.")] = False,
) -> None:
    """Check broker, database, policy, queues, processes, disk, permissions, GPU and versions, from this host.

    Each line says what was found, and what to do about it. Nothing is changed. Exit status 1 where there is a problem.

    Example: moderato doctor

    Example: moderato doctor --json
    """
    # What several checks use, before their threads do: of two that import it at once, kombu may find it half imported.
    import kombu.transport.redis  # noqa: F401

    import api_client.client  # noqa: F401
    import model.engine  # noqa: F401
    from config.settings import settings

    findings = []
    for finding in examine(settings(), CHECKS):
        findings.append(finding)
        if not as_json:
            _show(finding)
    well = all(finding.level != "problem" for finding in findings)
    if as_json:
        print_json({"ok": well, "findings": [asdict(finding) for finding in findings]})
    if not well:
        raise typer.Exit(1)


def examine(settings: Settings, checks: dict[str, tuple[Check, float]]) -> Iterator[Finding]:
    """Make all checks side by side, and give what they find in their order. One that hangs is left, and a problem."""
    started = time.monotonic()
    running = {name: _Running(name, check, settings) for name, (check, _) in checks.items()}
    for name, (_, timeout_s) in checks.items():
        yield from running[name].findings(max(0.0, started + timeout_s - time.monotonic()), timeout_s)


class _Running:
    """A check in a thread of its own, which nobody waits for at the end."""

    def __init__(self, name: str, check: Check, settings: Settings) -> None:
        self._name = name
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, args=(check, settings), name=name, daemon=True)
        self._thread.start()

    def _run(self, check: Check, settings: Settings) -> None:
        try:
            for finding in check(settings):
                self._found.append(finding)
        except Exception as error:
            said = f"could not be checked: {type(error).__name__}: {error}".splitlines()[0]
            self._found.append(Finding(self._name, "problem", said))

    def findings(self, left_s: float, timeout_s: float) -> list[Finding]:
        self._thread.join(left_s)
        if not self._thread.is_alive():
            return self._found
        silent = Finding(self._name, "problem", f"no answer within {timeout_s:g} s", "it is hung or unreachable")
        return [*self._found, silent]


def _show(finding: Finding) -> None:
    line = Text.assemble(f"{finding.part:<12}", (f"{finding.level:<8}", STYLES[finding.level]), f" {finding.said}")
    print_line(line, SAID_COLUMN)
    if finding.advice:
        print_line(Text(f"{'':<{SAID_COLUMN}}→ {finding.advice}"), SAID_COLUMN)
