"""Which of Celery's pools our apps refuse to run in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import PREFIX, ROOT

GEVENT = {
    "__init__.py": "",
    "monkey.py": "def patch_all():\n    pass\n",
    "signal.py": "",
    "socket.py": "from socket import socket\n",
}
"""As much of gevent as Celery looks at before it starts."""


@pytest.mark.parametrize("app", ["worker", "trainer"])
def test_a_pool_without_celerys_event_loop_is_refused_at_the_start(app: str, tmp_path: Path) -> None:
    (tmp_path / "gevent").mkdir()
    for name, content in GEVENT.items():
        (tmp_path / "gevent" / name).write_text(content, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | {
        "PYTHONPATH": str(tmp_path),
        # Nothing listens there: whoever is not refused waits for it for ever.
        "MODERATO_BROKER_URL": f"redis+socket://{tmp_path}/redis.sock",
        "MODERATO_DATABASE_URL": f"sqlite:///{tmp_path}/moderato.db",
    }
    started = subprocess.run(
        [sys.executable, "-m", "celery", "-A", app, "worker", "-P", "gevent"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert started.returncode == 1, started.stderr
    assert started.stderr.splitlines()[-1].startswith("moderato: ")
    assert "Traceback" not in started.stderr
