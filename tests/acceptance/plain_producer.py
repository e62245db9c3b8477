"""A producer that knows nothing of this project but its message: plain Celery, plain CSV.

python plain_producer.py BROKER_URL COMMENTS_CSV

Sends the first half of the comments in lists of 64 and the others one in a message, and prints each one's submission
id in the order of the file.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from celery import Celery


def messages(texts: list[str]) -> Iterator[list[str]]:
    half = len(texts) // 2
    yield from (texts[start : min(start + 64, half)] for start in range(0, half, 64))
    yield from ([text] for text in texts[half:])


def main(broker_url: str, path: str) -> None:
    with Path(path).open(encoding="utf-8", newline="") as file:
        texts = [row["comment_text"] for row in csv.DictReader(file)]
    app = Celery(broker=broker_url)
    for listed in messages(texts):
        sent = app.send_task("worker.moderate", [[{"text": text} for text in listed]], queue="toxicity")
        for index in range(len(listed)):
            print(f"{sent.id}:{index}")


if __name__ == "__main__":
    main(*sys.argv[1:])
