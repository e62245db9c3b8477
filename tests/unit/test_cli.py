"""The command line without a broker or a database: what it teaches, loads, and says when something is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.terminal import Problem, shorten
from cli.training import parse_overrides
from config.settings import ROOT, TrainerSettings, explanations

COMMANDS = [
    ["demo"],
    ["up"],
    ["status"],
    ["submit"],
    ["results"],
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
    ["activate"],
    ["rollback"],
    ["score"],
    ["evaluate"],
    ["train"],
    ["dataset"],
    ["report"],
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


def test_the_help_lists_every_command() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert all(command[0] in done.output for command in COMMANDS)


@pytest.mark.parametrize("arguments", ["--help", "submit", "status --json", "review next", "review agreement"])
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


class TestMistakes:
    def test_neither_texts_nor_a_file(self) -> None:
        assert complaint("submit").startswith("moderato: give either texts or --file")

    def test_a_file_of_another_kind(self) -> None:
        assert complaint("submit", "--file", "comments.txt").startswith(
            "moderato: comments.txt must end in .csv or .jsonl"
        )

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        said = complaint("submit", "--file", str(tmp_path / "absent.csv"))
        assert said.startswith(f"moderato: {tmp_path / 'absent.csv'} cannot be read: ")

    def test_a_csv_without_the_text_column_names_those_it_has(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("id,body\n1,hello\n")
        said = complaint("submit", "--file", str(tmp_path / "c.csv"))
        assert said.endswith("c.csv has no column 'comment_text'; it has id, body. Name it with --text-column")

    def test_a_line_that_is_not_json(self, tmp_path: Path) -> None:
        (tmp_path / "c.jsonl").write_text('\n{"text": \n')
        assert complaint("submit", "--file", str(tmp_path / "c.jsonl")).endswith("c.jsonl, line 2 is not JSON")

    def test_a_comment_that_no_worker_would_take(self) -> None:
        assert complaint("submit", " ") == (
            "moderato: comment 0 (counted from 0): 'text' is empty, or holds nothing that can be seen; "
            "a comment needs text to be scored"
        )

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
        assert "rows.csv, row 3, column toxic: a value of 8 characters is not 0, 1" in said
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
        assert done.stderr.startswith("moderato: unknown setting broker in the environment; did you mean broker_url?")


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
