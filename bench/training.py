"""How fast a training is: `python -m bench.training`, on a machine that need have torch and transformers only.

A DistilBERT-size network learns three epochs of as many rows as the whole Jigsaw set has, with our settings; and some
of them with those that transformers.Trainer has by itself. What else it needs comes as to `bench.gpu`.
"""

import argparse
from pathlib import Path

from bench.gpu import WHEELS, check_python, run_with_wheels

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "training.json"
JIGSAW_ROWS = 159_571


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    arguments.add_argument(
        "--rows", type=int, default=JIGSAW_ROWS, help="to learn from; ours are repeated to fill them"
    )
    arguments.add_argument("--epochs", type=float, default=3.0)
    arguments.add_argument(
        "--baseline-rows", type=int, default=16_000, help="for the Trainer's own settings, one epoch"
    )
    arguments.add_argument("--batch-size", type=int, help="of ours; by default that of config/default.yaml")
    arguments.add_argument("--size", choices=("distilbert", "minilm", "tiny"), default="distilbert")
    arguments.add_argument("--wheels", type=Path, default=WHEELS, help=f"by default {WHEELS}")
    arguments.add_argument("--out", type=Path, default=RESULT, help=f"the figures as JSON; by default {RESULT}")
    arguments.add_argument("--only", choices=("ours", "baseline"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    check_python()
    try:
        from bench.training_measure import run
    except ModuleNotFoundError as error:
        raise SystemExit(run_with_wheels("bench.training", options.wheels.resolve(), str(error.name))) from None
    run(options)


if __name__ == "__main__":
    main()
