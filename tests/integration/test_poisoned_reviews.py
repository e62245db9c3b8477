"""One reviewer flips the labels of what they review. The gate refuses what comes of it; the others' word disarms it.

On a small version that has really learnt from the samples, under the bars that the project ships.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine

from bench.tiny import HOLDOUT, TRAIN, copy_version, write_tiny_version
from config.names import LABELS
from config.settings import ROOT, Settings, load_settings
from db import queries, reviews
from db.queries import RunRow
from db.session import reading, writing
from model.version import read_manifest
from tests.integration.rows import prepare, scored
from trainer.agreement import compare_reviewers
from trainer.dataset import Dataset, read_csv
from trainer.retraining import carry_out

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

HONEST_RUN, POISONED_RUN = (f"6f1e2d3c-0000-4000-8000-00000000000{n}" for n in range(2))


@pytest.fixture(scope="module")
def learnt_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small version that tells toxic comments from others: ROC-AUC about 0.9 on the held-out rows."""
    versions = tmp_path_factory.mktemp("versions")
    return write_tiny_version(versions, "learnt", rows=2_000, epochs=3, learning_rate=3e-3, batch_size=32).directory


@pytest.fixture(scope="module")
def comments() -> Dataset:
    """What a community wrote, at the natural rate; nothing was trained on it."""
    return read_csv(ROOT / "samples" / "comments.csv")


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    retrain = {
        "MAX_LENGTH": 64,
        "MAX_ROWS": 600,
        "TRAIN_FILES": f"[{TRAIN}]",
        "HOLDOUT_FILE": HOLDOUT,
        "EPOCHS": 1,
        "LEARNING_RATE": 3e-4,
        "CALIBRATION_TEXTS": 16,
        "REPORT_TO": "[]",
        "ROBUSTNESS_ROWS": 60,
    }
    environment = {
        "MODERATO_DATABASE_URL": database_url,
        "MODERATO_BROKER_URL": redis_url,
        "MODERATO_VERSIONS_DIR": str(tmp_path / "versions"),
    }
    return load_settings(environment | {f"MODERATO_TRAINER__{key}": str(value) for key, value in retrain.items()})


def review(engine: Engine, comments: Dataset, rows: Iterable[int], reviewer: str, *, flipped: bool = False) -> None:
    """The reviewer judges these comments as their known labels do, or contrary to all of them."""
    with writing(engine) as connection:
        for row in rows:
            known = zip(LABELS, comments.labels[row], strict=True)
            labels = {label: bool(value) != flipped for label, value in known if not np.isnan(value)}
            queries.add_review(
                connection,
                submission_id=str(row),
                action="hide" if any(labels.values()) else "allow",
                labels=labels,
                reviewer=reviewer,
                note=None,
                now=datetime.now(UTC),
            )


def retrain(engine: Engine, settings: Settings, run_id: str) -> RunRow:
    with writing(engine) as connection:
        queries.request_run(connection, run_id=run_id, requested_by="me", overrides={}, now=datetime.now(UTC))
    carry_out(run_id, settings)
    with reading(engine) as connection:
        run = queries.run(connection, run_id)
    assert run is not None
    return run


def test_flipped_reviews_do_not_get_through(
    engine: Engine, settings: Settings, learnt_version: Path, comments: Dataset
) -> None:
    # Given an active version that learnt, and a thousand decisions
    copy_version(learnt_version, settings.versions_dir, "learnt")
    with writing(engine) as connection:
        prepare(connection)
        queries.register_version(connection, read_manifest(learnt_version).model_dump(), datetime.now(UTC))
        queries.activate(
            connection,
            instead_of=queries.active(connection),
            version="learnt",
            by="me",
            reason="test",
            now=datetime.now(UTC),
        )
        queries.record_decisions(connection, [scored(str(n), comments.texts[n]) for n in range(1_000)])

    # When honest reviewers judge a hundred of them, Then what comes of it is promoted
    review(engine, comments, range(100), "ann")
    honest = retrain(engine, settings, HONEST_RUN)
    assert honest.state == "promoted", honest.reason

    # When one more reviewer flips the labels of eight hundred that nobody else looks at, Then the gate refuses
    review(engine, comments, range(200, 1_000), "mallory", flipped=True)
    poisoned = retrain(engine, settings, POISONED_RUN)
    assert poisoned.state == "refused", poisoned.reason
    assert "toxic log loss" in str(poisoned.reason)
    with reading(engine) as connection:
        active = queries.active(connection)
    assert active is not None
    assert active.version == honest.version

    # When two honest reviewers look at thirty of those too, Then the flipped words weigh next to nothing
    review(engine, comments, range(200, 230), "ben")
    review(engine, comments, range(200, 230), "cem")
    with reading(engine) as connection:
        weights = {each.name: each.weight for each in compare_reviewers(reviews.judged_texts(connection))}
    assert weights["mallory"] < 0.1 < 1 <= weights["ben"]
