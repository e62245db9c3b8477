"""The systemd units as they are written: what they start is what the documentation says to start."""

import configparser
import shlex

import pytest

from config.names import MODERATE_QUEUES, RETRAIN_QUEUE
from config.settings import ROOT


@pytest.mark.parametrize(("app", "queues"), [("worker", MODERATE_QUEUES), ("trainer", (RETRAIN_QUEUE,))])
def test_a_unit_starts_what_the_quickstart_does(app: str, queues: tuple[str, ...]) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "deploy" / "systemd" / f"moderato-{app}.service", encoding="utf-8")
    # systemd itself reads %h, and makes %h of %%h
    program, *arguments = shlex.split(unit["Service"]["ExecStart"].replace("%%", "%"))
    assert program == f"{unit['Service']['WorkingDirectory']}/.venv/bin/celery"
    assert arguments == shlex.split(f"-A {app} worker -Q {','.join(queues)} -n {app}@%h -l INFO")
    assert shlex.join(["celery", *arguments]) in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
