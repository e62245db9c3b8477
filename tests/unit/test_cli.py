"""The command line without a broker or a database: what it teaches, loads, and says when something is wrong."""

import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.status import drift_lines
from cli.terminal import Problem, shorten, shown
from cli.times import days_ago, past
from cli.training import parse_overrides
from config.names import FORMER_STARTERS, LABELS, STARTER_VERSION
from config.settings import ROOT, TrainerSettings, explanations, settings
from db.drift import Drift

COMMANDS = [
    ["demo"],
    ["up"],
    ["status"],
    ["submit"],
    ["results"],
    ["explain"],
    ["doctor"],
    ["review"],
    ["review", "next"],
    ["review", "agreement"],
    ["dead-letters"],
    ["dead-letters", "list"],
    ["dead-letters", "show"],
    ["dead-letters", "retry"],
    ["dead-letters", "purge"],
    ["erase"],
    ["retrain"],
    ["models"],
    ["models", "compare"],
    ["models", "prune"],
    ["activate"],
    ["rollback"],
    *(["policy", each] for each in ("show", "check", "diff", "replay", "activate", "rollback", "history")),
    ["score"],
    ["evaluate"],
    ["train"],
    ["dataset"],
    ["report"],
    ["health"],
    ["webhooks"],
    ["webhooks", "run"],
    ["webhooks", "list"],
    ["webhooks", "test"],
    ["webhooks", "dead"],
    ["webhooks", "retry"],
    ["db", "upgrade"],
    ["db", "downgrade"],
]


def complaint(*arguments: str) -> str:
    """What a command that cannot be carried out says."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.replace("\n", " ").strip()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_teaches_by_an_example(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    assert f"Example: moderato {' '.join(command)}" in done.output


def test_the_version_of_the_release() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.split() == ["moderato", version("moderato")]


def test_review_alone_teaches() -> None:
    done = CliRunner().invoke(app, ["review"])
    assert "Example: moderato review" in done.output and "moderato review next" in done.output


def test_the_help_lists_every_command() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert all(command[0] in done.output for command in COMMANDS)


def test_what_does_not_go_with_following() -> None:
    assert "--follow does not go with --label" in complaint("results", "--follow", "--label", "toxic")
    assert "--follow does not go with --limit" in complaint("results", "--follow", "--limit", "3")
    assert "'x' is no cursor" in complaint("results", "--follow", "--after", "x")
    assert "--after goes with --follow" in complaint("results", "--after", "1")


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock is nine hours ahead of UTC."""
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_times() -> None:
    now = datetime.now(UTC)
    assert timedelta(minutes=9) < now - past("10m") <= timedelta(minutes=10)
    assert timedelta(days=7) > now - past("6.9d") > timedelta(days=6)
    # By the clock that times are shown by, so that one can be pasted back; unless it names a zone
    assert past("2026-11-23") == past("2026-11-22T15:00:00Z") == datetime(2026, 11, 22, 15, tzinfo=UTC)
    date, clock, zone = shown(past("2026-11-23 12:30:05")).split()
    assert (date, clock, zone) == ("2026-11-23", "12:30:05", "JST")
    assert past("2026-11-23 12:00+02:00") == datetime(2026, 11, 23, 10, tzinfo=UTC)
    assert timedelta(weeks=9_999) >= now - past("9999w") > timedelta(weeks=9_998)
    for wrong in ("soon", "10", "7 d", "7y", "-5m", "1000000d", "99999999999w"):
        with pytest.raises(Problem, match="10m"):
            past(wrong)
    for days in (1e9, math.inf, math.nan):
        with pytest.raises(Problem, match="days"):
            days_ago(days)


def test_webhooks_without_an_endpoint() -> None:
    assert "no endpoint is set" in complaint("webhooks", "run")
    assert "there is no endpoint 'news'" in complaint("webhooks", "test", "news")
    assert "say which" in complaint("webhooks", "retry")


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "submit",
        "status --json",
        "review next",
        "explain 1",
        "review agreement",
        "policy check config/policy.yaml",
        "policy replay config/policy.yaml",
    ],
)
def test_light_commands_load_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    # Given a fresh interpreter, and nothing that answers
    script = (
        "import sys\nfrom cli.main import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n    print(sorted({'torch', 'pandas', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        cwd=ROOT,
        env={"MODERATO_BROKER_URL": "redis://127.0.0.1:1/0", "MODERATO_DATABASE_URL": f"sqlite:///{tmp_path}/x.db"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Then it ran, and neither torch nor pandas was imported for it
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


class TestPolicyFiles:
    """Without a database."""

    @pytest.fixture(autouse=True)
    def no_database(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("MODERATO_DATABASE_URL", f"sqlite:///{tmp_path}/absent/moderato.db")
        settings.cache_clear()
        yield
        # And none was made by asking for one
        assert not (tmp_path / "absent").exists()
        settings.cache_clear()

    def test_a_check_names_what_may_be_a_mistake(self, tmp_path: Path) -> None:
        file = tmp_path / "policy.yaml"
        file.write_text("communities: {default: {toxic: {hide: 0.5}}, kids: {inherits: default, threat: {hide: 0.1}}}")
        done = CliRunner().invoke(app, ["policy", "check", str(file)])
        assert done.exit_code == 0, done.output
        assert "is a policy: " in done.stdout and "2 communities" in done.stdout
        assert "warning: no rule names insult: nothing ever follows from its score" in done.stderr
        assert "threat" not in done.stderr
        facts = json.loads(CliRunner().invoke(app, ["policy", "check", str(file), "--json"]).stdout)
        assert facts["communities"] == ["default", "kids"]
        assert facts["policy_version"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert len(facts["warnings"]) == 4

    def test_a_check_names_the_place_of_an_error(self, tmp_path: Path) -> None:
        file = tmp_path / "policy.yaml"
        file.write_text("communities: {default: {}, kids: {toxic: {hide: 7}}}")
        said = complaint("policy", "check", str(file))
        assert said == f"moderato: policy {file}: communities.kids.toxic.hide = 7 is not a threshold from 0 to 1"


class TestMistakes:
    def test_neither_texts_nor_a_file(self) -> None:
        assert complaint("submit").startswith("moderato: give either texts or --file")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        said = complaint("submit", "--file", str(tmp_path / "absent.csv"))
        assert said.startswith(f"moderato: {tmp_path / 'absent.csv'} cannot be read: ")

    def test_a_csv_without_the_text_column_names_those_it_has(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("id,body\n1,hello\n")
        said = complaint("submit", "--file", str(tmp_path / "c.csv"))
        assert said.endswith("c.csv has no column 'comment_text'; it has 'id', 'body'. Name it with --text-column")

    def test_a_line_that_is_not_json(self, tmp_path: Path) -> None:
        (tmp_path / "c.jsonl").write_text('\n{"text": \n')
        assert "c.jsonl, line 2: is not JSON" in complaint("submit", "--file", str(tmp_path / "c.jsonl"))

    def test_a_file_that_is_only_checked(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("text,toxic\nhello,1\n,0\nthanks,0\n")
        file = ["submit", "--file", str(tmp_path / "c.csv"), "--dry-run"]
        assert "c.csv, line 3: " in complaint(*file)
        done = CliRunner().invoke(app, [*file, "--skip-bad-rows"])
        assert (done.exit_code, done.stdout) == (0, "")
        assert "'toxic'" in done.stderr and "line 3" in done.stderr
        assert "2 would be submitted, 1 skipped" in done.stderr

    def test_an_option_of_files_without_a_file(self) -> None:
        assert "--id-column" in complaint("submit", "hello", "--id-column", "nr")

    def test_a_comment_that_no_worker_would_take(self) -> None:
        assert complaint("submit", " ") == (
            "moderato: comment 0 (counted from 0): 'text' is empty, or holds nothing that can be seen; "
            "a comment needs text to be scored"
        )

    def test_an_explanation_of_nothing(self) -> None:
        assert complaint("explain").startswith("moderato: give either a submission's id or --comment-id")
        assert complaint("explain", "x", "--text").endswith("of a text that is scored again: add --rerun")

    def test_a_label_that_is_not_said_of(self) -> None:
        said = complaint("review", "some:0", "--action", "hide", "--label", "toxic=yes")
        assert said.startswith("moderato: --label toxic=yes must be LABEL=0 or LABEL=1; the labels are toxic, ")

    def test_an_unknown_setting_of_a_training(self) -> None:
        said = complaint("retrain", "--set", "epoch=1")
        assert said.startswith("moderato: unknown setting trainer.epoch in the request; did you mean epochs?")

    def test_a_setting_of_a_training_that_is_out_of_its_range(self, tmp_path: Path) -> None:
        said = complaint("train", "--name", "x", "--learning-rate", "2")
        assert said.startswith("moderato: setting trainer.learning_rate = 2.0 in the options is wrong: Input should be")
        # And where a file says so, the file is named
        (tmp_path / "recipe.yaml").write_text("epoch: 1")
        said = complaint("train", "--name", "x", "--config", str(tmp_path / "recipe.yaml"))
        assert "unknown setting trainer.epoch in " in said and "recipe.yaml; did you mean epochs?" in said

    def test_settings_of_other_parts_in_the_file_of_a_training(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text("trainer: {epochs: 1}\nworker: {threads: 1}")
        said = complaint("train", "--name", "x", "--config", str(tmp_path / "recipe.yaml"))
        assert said.endswith("or the trainer's settings alone; it holds trainer, worker")

    def test_columns_of_a_training_without_a_name(self) -> None:
        said = complaint("train", "--name", "x", "--columns", "body")
        assert said == "moderato: --columns body must be OURS=THEIRS, for example --columns comment_text=body"

    def test_a_dataset_that_cannot_be_trained_on(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text("comment_text,toxic\nfine,0\n0,you fool\n", encoding="utf-8")
        said = complaint("dataset", "--train", str(path))
        assert "rows.csv, line 3, column toxic: a value of 8 characters is not 0, 1" in said
        assert "fool" not in said

    def test_two_starts_of_a_training(self) -> None:
        said = complaint("train", "--name", "x", "--from", "starter-2", "--encoder", "distilbert-base-uncased")
        assert said == "moderato: --encoder and --from exclude each other: a training has one start"

    def test_a_wrong_setting_stops_every_command(self) -> None:
        # Given an environment with a misspelt setting, and a fresh interpreter that reads it
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "status"],
            cwd=ROOT,
            env={"MODERATO_BROKER": "redis://localhost"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("moderato: unknown setting broker in the variable MODERATO_BROKER; did you mean ")


def test_every_setting_of_the_trainer_is_an_option_with_its_default_and_the_reason() -> None:
    # Given a terminal wide enough for each explanation to stand on one line
    done = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "2000", "TERMINAL_WIDTH": "2000"})
    assert done.exit_code == 0
    explained = explanations("trainer")
    assert explained.keys() == TrainerSettings.model_fields.keys()
    for name, explanation in explained.items():
        assert explanation.reason, f"config/default.yaml has no line above {name}"
        [line] = re.findall(rf"│ --{name.replace('_', '-')}[ ,].*", done.stdout)
        assert f"{explanation.reason} [default: {explanation.default}]" in line
        assert f"─ {explanation.heading} ─" in done.stdout


def test_a_dataset_is_described_and_none_of_its_comments_is_shown(tmp_path: Path) -> None:
    # Given a file of which one text is held out, in another spelling
    train, holdout, card = (tmp_path / name for name in ("rows.csv", "holdout.csv", "CARD.md"))
    train.write_text("body,toxic\nTwo wise fools!,0\nAnother,1\nanother ,1\nthird,\n", encoding="utf-8")
    holdout.write_text("comment_text,toxic\ntwo wise fools,0\n", encoding="utf-8")
    named = ["--train", str(train), "--holdout", str(holdout), "--columns", "comment_text=body"]
    # When it is checked
    done = CliRunner().invoke(app, ["dataset", *named, "--output", str(card)])
    # Then the card tells what became of each row, and holds none
    assert done.exit_code == 0, done.output
    written = card.read_text(encoding="utf-8")
    for line in (
        f"| {train} | 4 | ",
        "| read | 4 |",
        "| dropped: no label is known | 1 |",
        "| dropped: held out too | 1 |",
        "| merged with the same text | 1 |",
        "| trained on | 1 |",
        "| toxic | 1 | 0 | 0 | 0 |",
    ):
        assert line in written
    assert "fools" not in written.lower()
    assert "Only 0 validation rows" in done.stderr
    # And a program has the same
    done = CliRunner().invoke(app, ["dataset", *named, "--json"])
    assert json.loads(done.stdout)["sha256"] in written


def test_an_encoding_is_that_of_the_files_one_names(tmp_path: Path) -> None:
    # Given rows in an encoding that the held-out rows of the settings have not
    (tmp_path / "rows.csv").write_text("text;toxic\ngrün;1\n\u00a0;0\n", encoding="cp1252")
    options = ["--train", str(tmp_path / "rows.csv"), "--encoding", "cp1252", "--skip-bad-rows", "--json"]
    done = CliRunner().invoke(app, ["dataset", *options])
    assert done.exit_code == 0, done.output
    # Then those are what they always are, and the bad row is the only one left out
    card = json.loads(done.stdout)
    plain = json.loads(CliRunner().invoke(app, ["dataset", "--json"]).stdout)
    assert card["holdout"] == plain["holdout"]
    assert card["sources"][0]["rows"] == 1
    assert re.findall(r"line \d", done.stderr) == ["line 3"]


class TestVersionNames:
    """Checked before anything is read, trained or written."""

    @pytest.fixture(autouse=True)
    def versions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        (tmp_path / "versions" / "taken").mkdir(parents=True)
        (tmp_path / "versions" / "dangling").symlink_to(tmp_path / "nowhere")
        (tmp_path / "versions" / ".pruned" / "gone").mkdir(parents=True)
        monkeypatch.setenv("MODERATO_VERSIONS_DIR", str(tmp_path / "versions"))
        monkeypatch.setenv("MODERATO_DATABASE_URL", f"sqlite:///{tmp_path}/absent/moderato.db")
        settings.cache_clear()
        before = sorted(tmp_path.rglob("*"))
        yield tmp_path / "versions"
        assert sorted(tmp_path.rglob("*")) == before
        settings.cache_clear()

    @pytest.mark.parametrize(
        "name", ["my model", "../evil", "/tmp/evil", "team/model-1", ".hidden", "x\n", "x" * 101, ""]
    )
    @pytest.mark.parametrize(
        "command", [["train", "--train", "absent.csv", "--name"], ["activate"], ["canary", "start"], ["ab", "start"]]
    )
    def test_what_cannot_be_a_name(self, command: list[str], name: str) -> None:
        assert repr(name) in complaint(*command, name)

    @pytest.mark.parametrize("name", ["taken", "dangling", "gone", STARTER_VERSION, *FORMER_STARTERS])
    def test_a_name_that_another_version_has_or_had(self, name: str) -> None:
        said = complaint("train", "--train", "absent.csv", "--name", name)
        assert f"version {name}" in said and "another name" in said


class TestOverrides:
    def test_values_are_read_as_yaml(self) -> None:
        assert parse_overrides(["epochs=0.5", "train_files=[a.csv, b.csv]"]) == {
            "epochs": 0.5,
            "train_files": ["a.csv", "b.csv"],
        }

    @pytest.mark.parametrize("override", ["epochs", "train_files=[a.csv"])
    def test_anything_else_is_a_problem(self, override: str) -> None:
        with pytest.raises(Problem, match=f"--set {override.replace('[', '.')}"):
            parse_overrides([override])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (None, ""),
        ("two\n lines", "two lines"),
        ("x" * 20, "xxxxxxxxx…"),
        ("red \x1b[31m", "red [31m"),
    ],
)
def test_a_comment_is_shown_on_one_line_and_cannot_steer_the_terminal(text: str | None, shown: str) -> None:
    assert shorten(text, 10) == shown


def test_status_names_what_has_moved_and_reads_it() -> None:
    # Given scores of which one has moved a little since the training and one a lot, and reviews
    drift = Drift(
        version="v1",
        decisions=10_000,
        decisions_before=600,
        psi_held_out=dict.fromkeys(LABELS, 0.01) | {"toxic": 0.12, "insult": 0.314},
        psi_before=dict.fromkeys(LABELS, 0.0),
        action_shares={"allow": 0.9, "hide": 0.1},
        action_shares_before={"allow": 1.0},
        reviewed=40,
        overturned=5,
    )
    assert [line.plain for line in drift_lines(drift)] == [
        "drift         against the held-out rows: insult 0.31 shifted, toxic 0.12 moderate, the others stable",
        "              against the day before: stable",
        "              allow 90.0% (the day before 100.0%), hide 10.0% (the day before 0.0%)",
        "              of 40 reviewed within a day 12.5% overturned",
    ]
    # And without enough to compare, nothing
    nothing = replace(drift, psi_held_out=None, psi_before=None, reviewed=0)
    assert drift_lines(nothing) == []
