"""Commands of `moderato` in the test's own process: to start another takes longer than most commands."""

from collections.abc import Mapping

from typer.testing import CliRunner, Result

from cli.main import app
from config.settings import settings


def run_here(environment: Mapping[str, str], *arguments: str, status: int = 0, stdin: str = "") -> Result:
    """Run a command to its end, which must be `status`, with these variables beside the process' own."""
    settings.cache_clear()
    try:
        done = CliRunner().invoke(app, arguments, input=stdin, env=environment, catch_exceptions=False)
    finally:
        settings.cache_clear()
    assert done.exit_code == status, done.stderr
    return done
