"""Two workers under one name: neither loses a comment, but whoever asks for one of them hears either."""

import logging
import threading

from celery import Celery

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0


def look_for_namesake(app: Celery, name: str) -> None:
    """Ask, from a thread of its own, who answers to this name; more than this worker is said in the log.

    Not an error: in a restart the old process may answer for a moment yet.
    """
    threading.Thread(target=_look, args=(app, name), name="namesake", daemon=True).start()


def _look(app: Celery, name: str) -> None:
    try:
        answers = app.control.broadcast("ping", destination=[name], reply=True, limit=2, timeout=ANSWER_TIMEOUT_S)
    except Exception as error:  # Redis is away, which is said elsewhere
        logger.debug("nobody could be asked for a namesake (%r)", error)
        return
    if len(answers) > 1:
        logger.warning(
            "another worker answers as %s too: `moderato status` and `models` show one of them, and remote control "
            "reaches both. Give each worker of a host a name of its own, such as -n worker2@%%h",
            name,
        )
