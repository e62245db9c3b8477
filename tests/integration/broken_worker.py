"""A pipeline that breaks, in a process of its own, because it ends its process.

python broken_worker.py VERSION_DIRECTORY DATABASE_URL engine|policy|acknowledgement TEXT
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config.policy import Policy
from db.session import open_database
from model.engine import load_scorer
from tests.integration.moderator import Moderator, wrapped


def main(directory: str, database_url: str, broken: str, text: str) -> None:
    logging.basicConfig(level=logging.INFO)
    scorer = load_scorer(Path(directory), device="cpu", threads=1)

    def fail(token_ids: Sequence[Sequence[int]]) -> None:
        raise RuntimeError(f"no kernel for {text}")

    moderator = Moderator(wrapped(scorer, before=fail) if broken == "engine" else scorer, open_database(database_url))
    if broken == "policy":
        moderator.pipeline.exchange_policy(Policy("", {}, ()))
    if broken == "acknowledgement":
        moderator.acknowledged = None  # type: ignore[assignment]
    moderator.deliver("m", {"text": text}, {"text": f"{text}, again"})
    moderator.start()
    time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
