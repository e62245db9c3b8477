"""How a process writes its log: as text, or as one JSON object a line. Owns the form of those lines.

What a line is about stands in fields of its own, given by `extra`: `submission_id`, `batch_id`, `version`, `reason`,
`run_id`. Never a comment's text.
"""

import logging
import re
from datetime import UTC, datetime
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

TEXT_FORMAT = "[%(asctime)s: %(levelname)s] %(message)s"
FIELDS = {"levelname": "level", "name": "logger"}


_SENTINEL = re.compile(r"<redis\.client\.Redis\(.*?\bhost=([^,]*),port=(\d+),.*?\)>\)>\)>")


def briefly(error: Exception) -> str:
    """What an error says; redis-py's page about the connection to each Sentinel is its host and port here."""
    return _SENTINEL.sub(r"\1:\2", str(error))


class _Briefly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(briefly(each) if isinstance(each, Exception) else each for each in record.args)
        return True


class JsonLines(JsonFormatter):
    """time, level, logger and message, then the fields of `extra`, and `exc_info` where there is an exception."""

    def __init__(self) -> None:
        super().__init__(["asctime", *FIELDS, "message"], rename_fields={"asctime": "time", **FIELDS})

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def use_format(log_format: LogFormat, logger: logging.Logger) -> None:
    """Have what a logger's handlers write take this form; `text` leaves them as they are."""
    if log_format == "json":
        for handler in logger.handlers:
            handler.setFormatter(JsonLines())


def follow_celery(log_format: LogFormat) -> None:
    """The same of the loggers that Celery sets up in this process, and in its pool's."""
    from celery.signals import after_setup_logger, after_setup_task_logger

    def use(logger: logging.Logger, **_: Any) -> None:
        use_format(log_format, logger)

    # What is said when no connection can be had.
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_Briefly())
    for signal in (after_setup_logger, after_setup_task_logger):
        signal.connect(use, weak=False)


def log_to_stderr(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Set up the log of a process of ours that is no Celery app."""
    logging.basicConfig(level=level, format=TEXT_FORMAT)
    use_format(log_format, logging.getLogger())
