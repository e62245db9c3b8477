"""The report page and the model card: whole in themselves, true to the manifest, and safe whatever a name holds."""

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cli.evaluating import warn_of_training_rows
from cli.main import app
from config.names import LABELS
from config.settings import ROOT, load_settings, read_recipe, relative_to_root, settings, trainer_settings
from db import queries
from db.session import open_database, writing
from model.version import STARTER_DIRECTORY, read_manifest
from trainer import figures
from trainer.dataset import Dataset, read_csv
from trainer.evaluation import measure
from trainer.report import (
    CARD_FILE,
    REPORT_FILE,
    Measured,
    Miss,
    measured_at_training,
    recipe,
    render_card,
    render_page,
    worst_misses,
    write_report,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "img", "link", "input", "hr"}
MARKUP = "<script>alert('x')</script> & \"quoted\" | $a_b$ ```"


class Page(HTMLParser):
    """A page that is parsed strictly: every element is closed where it must be, and every id is there once."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.drawn = ""
        self.feed(html)
        self.close()
        assert not self.open
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        self.ids = set(ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " * (tag in ("th", "td", "dt", "dd"))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            self.drawn += data * ("svg" in self.open)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("h2")]


def page_of(facts: Mapping[str, Any], directory: Path = STARTER_DIRECTORY, **more: Any) -> str:
    return render_page(directory, facts, more.pop("measured", None) or measured_at_training(facts), **more)


def complete(facts: dict[str, Any]) -> dict[str, Any]:
    """A manifest's facts with what the tiny version's own training did not come to."""
    shipped = facts["metrics"]["holdout_int8"]
    part = {"rows": 40, "positives": 11, "roc_auc": 0.81, "mean_roc_auc": 0.77}
    group = {"rows": 30, "positives": 9, "subgroup_auc": 0.9, "bpsn_auc": 0.71, "bnsp_auc": None}
    evaded = dict.fromkeys([*LABELS, "mean"], 0.75)
    shipped = shipped | {
        "slices": {"long": part, "obfuscated": part},
        "identities": {"women": group, MARKUP: group | {"bpsn_auc": 0.66}},
        "robustness": {"rows": 40, "plain": dict.fromkeys([*LABELS, "mean"], 0.8125), "leetspeak": evaded},
    }
    both = {"torch": 0.9, "int8": 0.8875}
    int8 = {"rows": 40, "largest_difference": 0.0317, "roc_auc": dict.fromkeys([*LABELS, "mean"], both)}
    history = [
        {"step": step, "epoch": step / 10, "loss": 1 / step, "validation_loss": 0.5 if step % 2 else None}
        for step in range(1, 9)
    ]
    advice = {"threshold": 0.42, "precision": 0.7, "recall": 0.6, "f1": 0.65, "positives": 30}
    return facts | {
        "metrics": facts["metrics"] | {"holdout_int8": shipped, "int8": int8, "history": history},
        "thresholds": {label: {"best_f1": advice, "target_precision": None} for label in LABELS},
        "dataset": facts["dataset"] | {"sources": [{"file": MARKUP, "rows": 12}, {"file": "b.csv", "rows": 1}]},
    }


@pytest.fixture(scope="module")
def facts(tiny_version: Path) -> dict[str, Any]:
    return complete(read_manifest(tiny_version).model_dump())


def test_a_page_is_whole_in_itself_and_can_be_read_without_seeing_it(facts: dict[str, Any], tiny_version: Path) -> None:
    # Given everything a version can have
    rows = read_csv(ROOT / "samples" / "holdout.csv").take(range(60))
    scores = np.random.default_rng(1).random((60, 6)).astype(np.float32)
    # When its page is drawn
    html = page_of(facts, tiny_version, measured=measured_at_training(facts, scores=scores, truth=rows.labels))
    page = Page(html)
    # Then nothing is fetched or run: names of XML's vocabularies are the only addresses
    assert html.startswith("<!DOCTYPE html>")
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert not page.all("script") and not page.all("link") and not page.all("img")
    assert not re.search(r"@import|url\((?!#)", html)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    # And every section is there, and every link leads to what is there
    assert page.sections == [
        *("origin", "labels", "confusion", "reliability", "thresholds", "slices", "identities", "robustness", "int8"),
        *("history", "dataset", "settings", "use"),
    ]
    references = [link["href"] for link in page.all("a")] + [use["xlink:href"] for use in page.all("use")]
    references += [f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", html)]
    assert {reference.removeprefix("#") for reference in references} <= page.ids
    # And each drawing has its words, each table its headers
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.all("svg"))
    assert len(page.all("svg")) == 12  # three by label, a reliability for each, identities, evasions, loss
    assert all(header["scope"] in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    # And no drawing keeps a colour that the dark would swallow
    assert "#0000" not in html


def test_a_page_tells_the_figures_of_the_manifest(facts: dict[str, Any], tiny_version: Path) -> None:
    text = " ".join(Page(page_of(facts, tiny_version)).text.split())
    shipped = facts["metrics"]["holdout_int8"]
    for label in LABELS:
        measured = shipped["labels"][label]
        low, high = measured["intervals"]["roc_auc"]
        assert f"{measured['roc_auc']:.3f} {low:.3f} to {high:.3f}" in text
        assert f"{label}: ECE {measured['ece']:.3f}" in text
    assert f"leetspeak 0.750 {0.8125 - 0.75:.3f}" in text
    assert "women 30 9 0.900 0.710" in text
    assert "threat 0.8875 0.9000 -0.0125" in text and "one comment is 0.032" in text
    assert shipped["dataset_sha256"] in text
    assert all(setting in text for setting in facts["settings"])
    assert all(f"{name} {version}" in text for name, version in facts["libraries"].items())


def test_an_old_manifest_has_a_page_without_what_it_lacks() -> None:
    # Given the manifest of the first release: areas, and nothing else
    facts = read_manifest(STARTER_DIRECTORY).model_dump() | {"calibration": {}, "thresholds": {}}
    shipped = facts["metrics"]["holdout_int8"]
    areas = ("positives", "negatives", "roc_auc", "average_precision")
    old = {key: shipped[key] for key in ("rows", "dataset_sha256", "mean_roc_auc")}
    old["labels"] = {label: {key: each[key] for key in areas} for label, each in shipped["labels"].items()}
    facts["metrics"] = {"training_loss": 0.07, "holdout_int8": old, "holdout_fp32": old, "seen": {"a test file": 0.98}}
    # When it is drawn
    page, card = Page(page_of(facts)), render_card(STARTER_DIRECTORY, facts)
    # Then what it has is shown, and there is no empty box
    assert page.sections == ["origin", "labels", "int8", "other", "dataset", "settings", "use"]
    assert f"{old['mean_roc_auc']:.3f}" in page.text and "95 %" not in page.text
    assert "a test file 0.98" in " ".join(page.text.split())
    assert "None" not in page.text and "nan" not in page.text
    assert "## Evaluation" in card and "## Bias" not in card and "## Robustness" not in card
    # And neither where there are no figures at all
    facts["metrics"] = {}
    assert Page(page_of(facts)).sections == ["origin", "dataset", "settings", "use"]
    assert "## Evaluation" not in render_card(STARTER_DIRECTORY, facts)


def test_how_many_rows_there_were_is_told_beside_the_figure(tiny_version: Path) -> None:
    # Given figures on few rows, of which a label has no positives and another some
    facts = complete(read_manifest(tiny_version).model_dump())
    figures = facts["metrics"]["holdout_int8"]
    figures["rows"] = 22
    for label, positives in zip(LABELS, (0, 3, 500, 500, 500, 500), strict=True):
        figures["labels"][label]["positives"] = positives
    # Then the first figure says so, and a label that was not measured is not called a rough figure
    text = " ".join(Page(page_of(facts, tiny_version)).text.split())
    assert "on 22 rows" in text
    assert f"so a rough figure: {LABELS[1]}. No positives, so not measured: {LABELS[0]}." in text


def test_rows_that_a_version_was_trained_on_are_told(tiny_version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_csv(ROOT / "samples" / "holdout.csv").take(range(60))
    manifest = read_manifest(tiny_version)
    trained_on = manifest.dataset | {"sources": [{"name": "mine.csv", "rows": 60, "sha256": rows.sha256}]}
    for dataset, warns in ((manifest.dataset, False), (trained_on, True)):
        warn_of_training_rows(manifest.model_copy(update={"dataset": dataset}), "rows.csv", rows)
        assert ("rows.csv" in capsys.readouterr().err) is warns


def test_markup_in_names_notes_and_comments_is_shown_as_text(facts: dict[str, Any], tiny_version: Path) -> None:
    # Given markup wherever somebody's words come in
    hostile = facts | {
        "version": MARKUP,
        "parent": MARKUP,
        "settings": facts["settings"] | {"report_to": [MARKUP, "x\n```\n# No heading"], "train_files": [MARKUP]},
        "libraries": {MARKUP: MARKUP},
    }
    measured = Measured(
        figures=facts["metrics"]["holdout_int8"],
        on=MARKUP,
        misses=[Miss("toxic", True, 0.1, MARKUP + "\x00\u202e"), Miss("insult", False, 0.9, "x" * 5000)],
    )
    comparison = {
        **{"figure": "ROC-AUC", "of": MARKUP, "active": 0.9, "candidate": 0.8, "worse_by": 0.1},
        **{"interval": [0.05, 0.15], "bar": 0.02, "passed": False},
    }
    verdict = {"state": "refused", "reason": MARKUP, "comparisons": [comparison]}
    # When page and card are made
    html = page_of(hostile, tiny_version, measured=measured, verdict=verdict, notes=[MARKUP])
    card = render_card(tiny_version, hostile)
    # Then it is text, in drawings too
    page = Page(html)
    assert not page.all("script")
    assert page.text.count(MARKUP) >= 9
    assert MARKUP.replace("_", " ") in page.drawn
    assert "\x00" not in html and "\u202e" not in html
    assert "x" * 500 in html and "x" * 700 not in html
    # And the card's tables keep their columns, its code blocks and front matter their ends
    body = card.split("---\n", 2)[2]
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^ {0,3}\1`*$", "", body)
    assert "<script>" not in outside.replace("\\<script\\>", "")
    assert "No heading" in body and "No heading" not in outside
    for block in re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["name"] == MARKUP


def test_a_page_with_comments_says_so(facts: dict[str, Any], tiny_version: Path) -> None:
    misses = [Miss("toxic", False, 0.93, "what somebody wrote")]
    measured = Measured(figures=facts["metrics"]["holdout_int8"], on="a file", misses=misses)
    with_comments, without = page_of(facts, tiny_version, measured=measured), page_of(facts, tiny_version)
    assert "This page holds comments" in with_comments and "what somebody wrote" in with_comments
    assert "holds comments" not in without and "misses" not in Page(without).sections


def test_the_worst_misses_are_those_farthest_on_the_wrong_side() -> None:
    # Given toxic scores, of which two are too high and two too low for 0.5, and one whose label is unknown
    truth = np.full((7, 6), math.nan, dtype=np.float32)
    truth[:, 0] = [0, 0, 0, 1, 1, 1, math.nan]
    scores = np.zeros((7, 6), dtype=np.float32)
    scores[:, 0] = [0.6, 0.9, 0.1, 0.5, 0.3, 0.2, 1.0]
    texts = list("abcdefg")
    thresholds = dict.fromkeys(LABELS, 0.5)
    # Then those are the misses, the worst first, as many of each kind as asked for
    found = worst_misses(texts, scores, truth, thresholds=thresholds, most=5)
    assert [(miss.label, miss.positive, miss.text) for miss in found] == [
        ("toxic", False, "b"),
        ("toxic", False, "a"),
        ("toxic", True, "f"),
        ("toxic", True, "e"),
    ]
    fewer = worst_misses(texts, scores, truth, thresholds=thresholds, most=1)
    assert [miss.text for miss in fewer] == ["b", "f"]


def test_the_recipe_is_every_setting_as_train_reads_them(tmp_path: Path) -> None:
    # Given settings that differ from the defaults, of a version that was fine-tuned from another
    base = load_settings({})
    changed = {"epochs": 3, "learning_rate": 8e-5, "report_to": ["a: b", "it's"], "columns": {"toxic": "target"}}
    chosen = trainer_settings(base, changed)
    facts = {"parent": "starter-1", "settings": relative_to_root(chosen.model_dump(mode="json"))}
    # When they are read from the file that the report tells to write
    (tmp_path / "recipe.yaml").write_text(str(recipe(facts)), encoding="utf-8")
    values = read_recipe(tmp_path / "recipe.yaml")
    # Then they are the same, but for the encoder, from which it did not start, and paths are the repository's
    assert trainer_settings(base, values) == chosen
    assert set(facts["settings"]) - set(values) == {"encoder"}
    assert values["train_files"] == ["samples/train.csv"]
    assert "encoder" in yaml.safe_load(str(recipe(facts | {"parent": None})))


def test_a_card_has_what_the_hub_reads(facts: dict[str, Any], tiny_version: Path) -> None:
    named = facts | {"settings": facts["settings"] | {"encoder": "distilbert-base-uncased"}}
    front = yaml.safe_load(render_card(tiny_version, named).split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "distilbert-base-uncased"
    figures = {metric["name"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert figures["ROC-AUC, toxic"] == round(facts["metrics"]["holdout_int8"]["labels"]["toxic"]["roc_auc"], 4)
    # An encoder from a folder, or a parent's, has a licence that only its own card can tell
    for unknown in (facts, named | {"parent": "starter-1"}):
        assert "license" not in yaml.safe_load(render_card(tiny_version, unknown).split("---\n")[1])


def test_a_version_is_written_with_its_report(facts: dict[str, Any], tiny_version: Path, tmp_path: Path) -> None:
    # Given held-out rows with their scores
    shutil.copytree(tiny_version, tmp_path / "version")
    rows = Dataset(["a comment that must not be published"] * 40, np.eye(40, 6, dtype=np.float32))
    scores = np.random.default_rng(2).random((40, 6)).astype(np.float32)
    shipped = measure(scores, rows).as_dict()
    # When the report is written among the version's files
    write_report(
        tmp_path / "version",
        facts | {"metrics": {"holdout_int8": shipped}},
        scores=scores,
        truth=rows.labels,
    )
    # Then the curves are in it, and no comment
    page = (tmp_path / "version" / REPORT_FILE).read_text(encoding="utf-8")
    card = (tmp_path / "version" / CARD_FILE).read_text(encoding="utf-8")
    assert "ROC curve of each label" in page
    assert rows.texts[0] not in page + card
    assert len(page) < 400_000


@pytest.fixture
def moderato(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`moderato` in this process, which has torch loaded: what it says, where it succeeds."""

    def run(*arguments: str, database_url: str) -> str:
        monkeypatch.setenv("MODERATO_DATABASE_URL", database_url)
        settings.cache_clear()
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.stderr

    yield run
    settings.cache_clear()


def test_the_command_adds_the_verdict_curves_and_misses(
    moderato: Callable[..., str], tiny_version: Path, sqlite_url: str, tmp_path: Path
) -> None:
    # Given a version that a run wrote and the gate refused, and labelled rows
    now = datetime.now(UTC)
    database = open_database(sqlite_url)
    with writing(database) as connection:
        queries.request_run(connection, run_id="run", requested_by="ann", overrides={}, now=now)
        queries.finish_run(connection, "run", state="refused", reason="worse at <threats>", version="tiny-1", now=now)
    database.dispose()
    rows = "".join((ROOT / "samples" / "holdout.csv").read_text(encoding="utf-8").splitlines(keepends=True)[:40])
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    command = ["report", str(tiny_version), "--output", str(tmp_path / "page.html")]
    # And a file of somebody else's, which is not overwritten
    (tmp_path / "page.html").write_text("<title>mine</title>")
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "page.html is not a report" in refused.stderr
    command.append("--force")
    # When its report is asked for with these rows to measure it on
    said = moderato(*command, "--holdout", str(tmp_path / "rows.csv"), "--misses", "1", database_url=sqlite_url)
    # Then the page has the verdict, the curves of these rows and their misses
    assert "with comments" in said
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert {"verdict", "misses", "robustness"} <= set(page.sections)
    assert "worse at <threats>" in page.text and "rows.csv, now, on" in page.text
    assert "ROC curve of each label" in [drawing["aria-label"] for drawing in page.all("svg")]

    # When there is no database to ask, then the page, overwritten without a word, goes without, and says so
    command.remove("--force")
    said = moderato(*command, database_url=f"sqlite:///{tmp_path}/none.db")
    assert "goes without a verdict" in said
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "verdict" not in page.sections and "the database could not be read" in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_shows_it_in_the_light_and_in_the_dark(
    facts: dict[str, Any], tiny_version: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of(facts, tiny_version), encoding="utf-8")
    brightness = {}
    for mode in ("Light", "Dark"):
        picture = tmp_path / f"{mode}.png"
        scheme = f"--blink-settings=preferredColorScheme={int(mode == 'Light')}"
        command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme]
        places = [f"--user-data-dir={tmp_path / mode}", f"--screenshot={picture}", "--window-size=390,3000"]
        subprocess.run([*command, *places, page.as_uri()], check=True, capture_output=True, timeout=120)
        pixels = matplotlib.image.imread(picture)[..., :3]
        brightness[mode] = float(np.median(pixels))
        # Not blank: every stretch of a screen's height has something on it
        assert all(part.std() > 0.01 for part in np.split(pixels, 6))
    assert brightness["Light"] > 0.9 and brightness["Dark"] < 0.2


def test_more_series_than_colours_are_drawn_apart() -> None:
    names = [f"label-{n}" for n in range(9)]
    curve = np.array([0.1, 1.0]), np.array([0.5, 1.0])
    points = [{"step": step, **dict.fromkeys(names, 0.5)} for step in (1, 2)]
    drawn = [
        figures.roc_curves(dict.fromkeys(names, curve)),
        figures.precision_recall_curves(dict.fromkeys(names, curve)),
        figures.history("title", points, {name: name for name in names}, axis="axis"),
        figures.dots("title", {"row": dict.fromkeys(names, figures.Dot(0.5, (0.4, 0.6)))}, axis="axis"),
    ]
    for page in drawn:
        assert all(name in page for name in names)
