"""Where rows come from: the Jigsaw challenge's files as Kaggle ships them, and datasets of the Hugging Face hub."""

import gzip
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.names import LABELS
from trainer.dataset import DatasetError
from trainer.sources import read_source

NAMES = ",".join(LABELS)
TRAIN = f'id,comment_text,{NAMES}\n0a,"fine, thanks",0,0,0,0,0,0\n0b,you fool,1,0,0,0,1,0\n'
TEST = "id,comment_text\n1a,not scored\n1b,scored\n1c,scored too\n"
TEST_LABELS = f"id,{NAMES}\n1c,1,0,1,0,0,0\n1a,-1,-1,-1,-1,-1,-1\n1b,0,0,0,0,0,0\n"


@pytest.fixture
def jigsaw(tmp_path: Path) -> Path:
    """The challenge's folder; the texts of the test set and their labels are not in the same order."""
    for name, content in (("train.csv", TRAIN), ("test.csv", TEST), ("test_labels.csv", TEST_LABELS)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def pack(path: Path) -> None:
    """As Kaggle ships it: each file in an archive of its own."""
    with zipfile.ZipFile(f"{path}.zip", "w") as archive:
        archive.write(path, path.name)
    path.unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_gives_the_training_rows_and_its_test_file_the_scored_ones(jigsaw: Path, packed: bool) -> None:
    if packed:
        for path in list(jigsaw.iterdir()):
            pack(path)
    # Whatever columns other sources have
    train = read_source(str(jigsaw), columns={"comment_text": "body", "toxic": "target"}, positive_from=0.9)
    assert train.texts == ["fine, thanks", "you fool"]
    assert train.labels.tolist() == [[0] * 6, [1, 0, 0, 0, 1, 0]]
    test = read_source(str(jigsaw / ("test.csv.zip" if packed else "test.csv")))
    assert test.texts == ["scored", "scored too"]
    assert test.labels.tolist() == [[0] * 6, [1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        pytest.param("test_labels.csv", "1c,", "9z,", r"id '9z' is in .*test_labels.csv but not in", id="unknown id"),
        pytest.param("test_labels.csv", "1a,-1,-1,-1,-1,-1,-1\n", "", r"id '1a' is in .*test.csv but not", id="lacks"),
        pytest.param("test_labels.csv", "1c,", "1b,", r"line \d: its id '1b' was there before", id="twice"),
        pytest.param("test_labels.csv", "insult", "rude", r"test_labels.csv has no column 'insult'", id="column"),
        pytest.param("test_labels.csv", "1c,1", "1c,2", r"test.csv, line 4, column toxic: '2'", id="value"),
        pytest.param("test.csv", "scored too", " ", r"test.csv, line 4, column comment_text: is empty", id="no text"),
        pytest.param("test.csv", "scored too", '"', r"test.csv, line 4: .* never closed", id="cut short"),
    ],
)
def test_test_files_that_do_not_fit_are_refused(jigsaw: Path, file: str, before: str, after: str, said: str) -> None:
    path = jigsaw / file
    path.write_text(path.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    with pytest.raises(DatasetError, match=said):
        read_source(str(jigsaw / "test.csv"))


def test_a_folder_without_training_rows_is_refused(jigsaw: Path) -> None:
    (jigsaw / "train.csv").unlink()
    with pytest.raises(DatasetError, match=r"has no train\.csv, nor train\.csv\.zip"):
        read_source(str(jigsaw))


def test_a_label_of_the_test_set_that_was_not_scored_alone_is_unknown(jigsaw: Path) -> None:
    path = jigsaw / "test_labels.csv"
    path.write_text(TEST_LABELS.replace("1c,1,0", "1c,1,-1"), encoding="utf-8")
    assert np.isnan(read_source(str(jigsaw / "test.csv")).labels).tolist() == [[False] * 6, [False, True] + [False] * 4]


# --- The hub: the library loads a folder of the same name as it does a dataset there ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "someone" / "civil").mkdir(parents=True)
    (tmp_path / "someone" / "civil" / "train.jsonl").write_text(
        '{"text": "hello", "toxicity": 0.1, "insult": true, "id": 7}\n'
        '{"text": "you fool", "toxicity": 0.8, "insult": null, "id": 8}\n'
        '{"text": null, "toxicity": 0.8, "insult": null, "id": 9}\n',
        encoding="utf-8",
    )
    return tmp_path / "someone" / "civil"


CIVIL: dict[str, Any] = {"columns": {"comment_text": "text", "toxic": "toxicity"}, "positive_from": 0.5}


def test_a_dataset_of_the_hub_gives_its_texts_and_the_labels_that_it_has(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = read_source("hub:someone/civil", **CIVIL)
    assert rows.texts == ["hello", "you fool"]
    np.testing.assert_array_equal(rows.labels[:, [0, 4]], [[0, 1], [1, np.nan]])
    assert np.isnan(rows.labels).sum() == 9
    # Nobody can mend them there, so they are left out, and counted
    assert "hub:someone/civil: 1 of 3 rows hold no text" in caplog.text
    # And a slice of a split is one
    assert read_source("hub:someone/civil:train[:1]", **CIVIL).texts == ["hello"]


@pytest.mark.parametrize(
    ("source", "columns", "said"),
    [
        ("hub:someone/civil:tset", {}, r"hub:someone/civil:tset cannot be loaded: .*tset"),
        ("hub:../civil", {}, r"hub:\.\./civil is no dataset's name"),
        ("hub:", {}, r"hub: is no dataset's name"),
        ("hub:someone/civil", {"comment_text": "txet"}, r"no column 'txet'.*did you mean 'text'\?"),
        ("hub:someone/civil", {"comment_text": "text", "toxic": "id"}, r"row 0, column toxic: '7\.0' is not 0, 1"),
    ],
)
def test_what_is_not_on_the_hub_is_refused_by_name(hub: Path, source: str, columns: dict[str, str], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        read_source(source, columns=columns)


def test_without_a_network_it_says_what_to_do(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    with pytest.raises(DatasetError, match=r"someone/absent is not in this machine's cache, and HF_HUB_OFFLINE is set"):
        read_source("hub:someone/absent")


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="pip install datasets"):
        read_source("hub:someone/civil")


def test_a_packed_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"comment_text,toxic\nx,1\n"))
    assert read_source(str(tmp_path / "rows.csv.gz")).texts == ["x"]
