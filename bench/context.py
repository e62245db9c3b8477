"""What every section is given: the texts, the servers, how thorough to be, and a way to say how far it has come."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from bench.system import Servers
from config.settings import ROOT

STREAM = ROOT / "samples" / "stream.csv.gz"


@dataclass(frozen=True, slots=True)
class Context:
    texts: list[str]
    """Real comments in their natural order."""
    servers: Servers
    quick: bool
    step: Callable[[str], None]
    """Says what is measured next."""

    def count(self, thorough: int, quick: int) -> int:
        return quick if self.quick else thorough

    @property
    def rounds(self) -> int:
        return self.count(3, 2)

    def slice(self, number: int, count: int) -> list[str]:
        """The `number`th run of so many texts, beginning again at the end."""
        start = number * count
        return [self.texts[n % len(self.texts)] for n in range(start, start + count)]


def read_texts() -> list[str]:
    texts: list[str] = pd.read_csv(STREAM, keep_default_na=False).comment_text.tolist()
    return texts
