"""`python -m bench.poison`: does what one hostile reviewer teaches get through? Retrains of the starter version.

Honest reviewers judge comments that the starter was not trained on as their known labels do. One more reviewer does
harm, in several ways and doses, on texts that nobody else reviews as a rule, where agreement cannot find him out. Each
retrain is the trainer's own, from the reviews to the gate.
"""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from bench.report import new_report
from cli.terminal import out, progress
from config.names import LABELS
from config.settings import ROOT, TrainerSettings, load_settings
from db.reviews import JudgedText, Labels
from model.engine import Scores, load_scorer
from model.version import STARTER_DIRECTORY, VersionError
from trainer.agreement import agreed_examples, compare_reviewers
from trainer.assembly import assemble
from trainer.dataset import Dataset, from_corrections, read_csv
from trainer.evaluation import Evaluation, evaluate
from trainer.gate import Judgement, judge
from trainer.recipe import from_version, train_version
from trainer.sources import read_holdout

COMMENTS = ROOT / "samples" / "comments.csv"
RESULTS = ROOT / "bench" / "results"
HONEST = ("ann", "ben", "cem")
HOSTILE = "mallory"
HONEST_REVIEWS = 200
QUICK = {"max_rows": 300, "epochs": 1, "max_length": 128, "checkpoint_steps": 0, "report_to": []}
"""A retrain of a minute or two."""


@dataclass(frozen=True, slots=True)
class Attack:
    """What the hostile reviewer does."""

    way: str
    """A key of `WAYS`."""
    reviews: int
    shared: int = 0
    """Of his reviews: on texts that an honest reviewer judged too."""

    @property
    def name(self) -> str:
        return f"{self.reviews} {self.way}" + (f", {self.shared} of them shared" if self.shared else "")


ATTACKS = (
    Attack("flipped", 0),
    Attack("flipped", 50),
    Attack("flipped", 200),
    Attack("flipped", 800),
    Attack("flipped", 200, shared=50),
    Attack("hate denied", 200),
    Attack("abuse confirmed", 400),
)


def main(
    seed: Annotated[int, typer.Option(help="Draws the reviews and everything in the training.")] = 1,
    keep: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = False,
) -> None:
    settings = load_settings({}).trainer.model_copy(update={**QUICK, "seed": seed})
    comments, holdout = read_csv(COMMENTS), read_holdout(settings)
    active = load_scorer(STARTER_DIRECTORY, device="cpu", engine="onnx")
    report = new_report(shlex.join(["python", "-m", "bench.poison", *sys.argv[1:]]), quick=False)
    run = {name: getattr(report, name) for name in ("command", "commit", "started_at", "machine", "versions")}
    results = []
    with progress("retraining", len(ATTACKS)) as update:
        opinions = active.score_texts(comments.texts)
        standing = evaluate(active, holdout, robustness_rows=settings.robustness_rows)
        for number, attack in enumerate(ATTACKS):
            update(number, note=attack.name)
            started = time.monotonic()
            reviews = draw_reviews(comments, opinions, attack, seed=seed)
            try:
                outcome: dict[str, Any] = {"verdict": retrain(reviews, holdout, standing, settings).as_dict()}
            except VersionError as unsound:
                outcome = {"not_published": str(unsound)}
            weights = {reviewer.name: round(reviewer.weight, 3) for reviewer in compare_reviewers(reviews)}
            results.append(
                {
                    "attack": asdict(attack),
                    "weights": weights,
                    "seconds": round(time.monotonic() - started, 1),
                    **outcome,
                }
            )
            update(number + 1, note=f"{attack.name}: {_in_a_word(outcome)}")
            if keep:
                path = RESULTS / f"poison-{date.today():%Y-%m-%d}-seed{seed}.json"
                facts = run | {"settings": settings.model_dump(mode="json"), "results": results}
                # Where the repository lies on this machine tells nobody anything.
                path.write_text(json.dumps(facts, indent=1).replace(f"{ROOT}/", "") + "\n", encoding="utf-8")
    out.print(_table(results))


def retrain(
    reviews: Sequence[JudgedText], holdout: Dataset, active: Evaluation, settings: TrainerSettings
) -> Judgement:
    """What the gate says of the starter version, trained further on these reviews.

    Raises:
        VersionError: it never comes to the gate, as what was trained is unsound.
    """
    data = assemble(settings, from_corrections(agreed_examples(reviews)), holdout)
    with tempfile.TemporaryDirectory(prefix="moderato-poison-") as name:
        candidate = train_version(
            from_version(STARTER_DIRECTORY),
            data,
            holdout,
            settings,
            version="poisoned",
            directory=Path(name, "poisoned"),
            work_dir=Path(name, "work"),
            report=lambda progress: None,
        )
    assert candidate is not None  # this is no torchrun
    return judge(candidate.evaluation, active, settings)


def draw_reviews(comments: Dataset, opinions: Scores, attack: Attack, *, seed: int) -> list[JudgedText]:
    """The honest reviews, the same for every attack of a seed, and the hostile ones.

    Args:
        comments: with the labels that honest reviewers know.
        opinions: the active version's scores of them, (rows, 6).
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(comments))
    honest, others = order[:HONEST_REVIEWS], order[HONEST_REVIEWS:]
    said: dict[int, dict[str, Labels]] = {}
    for place, row in enumerate(honest):
        # A third of them are looked at twice, as happens where the queue of reviews is shared.
        for reviewer in (HONEST[place % 3], HONEST[(place + 1) % 3])[: 2 if place % 3 == 0 else 1]:
            said.setdefault(int(row), {})[reviewer] = known_labels(comments, int(row))
    choose, say = WAYS[attack.way]
    targets = [*honest[: attack.shared], *choose(others, opinions)[: attack.reviews - attack.shared]]
    for row in map(int, targets):
        said.setdefault(row, {})[HOSTILE] = say(known_labels(comments, row))
    return [JudgedText(comments.texts[row], by_reviewer) for row, by_reviewer in said.items()]


def known_labels(comments: Dataset, row: int) -> Labels:
    values = zip(LABELS, comments.labels[row], strict=True)
    return {label: None if np.isnan(value) else bool(value) for label, value in values}


def _any(rows: np.ndarray, opinions: Scores) -> np.ndarray:
    return rows


def _highest(label: str) -> Callable[[np.ndarray, Scores], np.ndarray]:
    column = LABELS.index(label)
    return lambda rows, opinions: rows[np.argsort(-opinions[rows, column], kind="stable")]


def _flipped(labels: Labels) -> Labels:
    return {label: None if value is None else not value for label, value in labels.items()}


WAYS: dict[str, tuple[Callable[[np.ndarray, Scores], np.ndarray], Callable[[Labels], Labels]]] = {
    "flipped": (_any, _flipped),
    "hate denied": (_highest("identity_hate"), lambda labels: dict.fromkeys(LABELS) | {"identity_hate": False}),
    "abuse confirmed": (_highest("toxic"), lambda labels: dict.fromkeys(LABELS) | {"toxic": True}),
}
"""Which of the comments he picks, in what order, and what he says of each instead of its labels."""


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "reviews by one hostile reviewer", "his weight", "verdict", "mean ROC-AUC", "toxic ROC-AUC", "toxic log loss"
    )
    for each in results:
        who = Attack(**each["attack"]).name, f"{each['weights'].get(HOSTILE, '')}", _in_a_word(each)
        if (verdict := each.get("verdict")) is None:
            table.add_row(*who, each["not_published"])
            continue
        figures = {(part["figure"], part["of"]): part for part in verdict["comparisons"]}
        table.add_row(
            *who,
            *(
                f"{part['worse_by']:+.4f}, up to {part['interval'][1]:+.4f}"
                for part in (figures["ROC-AUC", "mean"], figures["ROC-AUC", "toxic"], figures["log loss", "toxic"])
            ),
        )
    return table


def _in_a_word(outcome: dict[str, Any]) -> str:
    if "not_published" in outcome:
        return "not published"
    return "promoted" if outcome["verdict"]["promoted"] else "refused"


if __name__ == "__main__":
    typer.run(main)
