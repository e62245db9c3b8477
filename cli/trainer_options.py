"""An option for every setting of the trainer, with its default and the reason for it from config/default.yaml."""

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from cli.terminal import Problem
from config.table_files import STDIN, Form

if TYPE_CHECKING:
    from config.settings import TrainerSettings

Recipe = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML file of the settings below; options count before it."),
]

STDIN_FILE = Path("/dev/stdin")
SHORT_NAMES = {"train_files": "--train", "holdout_file": "--holdout", "learning_rate": "--lr"}


class TrainerCommand(TyperCommand):
    """A command that takes settings of the trainer, all or those with `names`; it finds the given ones in `ctx.obj`.

    The options are made when the command is used: what they are made from takes longer to load than all other commands.
    """

    names: frozenset[str] | None = None

    @cached_property
    def _trainer_options(self) -> list[Any]:
        app = typer.Typer(add_completion=False)

        @app.command()
        def settings() -> None: ...

        settings.__signature__ = inspect.Signature(_parameters(self.names))  # type: ignore[attr-defined]
        return typer.main.get_command(app).params

    def get_params(self, ctx: Any) -> list[Any]:
        return [*super().get_params(ctx), *self._trainer_options]

    def invoke(self, ctx: Any) -> Any:
        values = {option.name: ctx.params.pop(option.name) for option in self._trainer_options}
        ctx.obj = _as_settings({name: value for name, value in values.items() if value not in (None, (), [])})
        return super().invoke(ctx)


def chosen_settings(options: Mapping[str, Any], recipe: Path | None) -> "TrainerSettings":
    """The trainer's settings as a command was given them: this host's, then the recipe's, then the options."""
    from config.settings import read_recipe, settings, trainer_settings

    base = settings()
    if recipe:
        base = base.model_copy(update={"trainer": trainer_settings(base, read_recipe(recipe), str(recipe))})
    return trainer_settings(base, options, "the options")


def _parameters(names: frozenset[str] | None) -> list[inspect.Parameter]:
    from config.settings import TrainerSettings, explanations

    explained = explanations("trainer")
    parameters = []
    for name, field in TrainerSettings.model_fields.items():
        if names is not None and name not in names:
            continue
        kind = _option_type(field.annotation)
        flag = f"--{name.replace('_', '-')}"
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            *([SHORT_NAMES[name]] if name in SHORT_NAMES else []),
            help=escape(f"{explained[name].reason} [default: {explained[name].default}]"),
            show_default=False,
            metavar="OURS=THEIRS" if field.annotation is not None and _is_mapping(field.annotation) else None,
            rich_help_panel=explained[name].heading,
        )
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    return parameters


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _option_type(annotation: Any) -> Any:
    """What an option's words are read as; its range is checked with all other settings."""
    return list[str] if isinstance(annotation, types.GenericAlias) else annotation


def forms(chosen: "TrainerSettings", form: Form) -> tuple[Form, Form]:
    """How training and held-out files are read: as the options say, but for the files that the settings come with."""
    from config.settings import settings

    usual = settings().trainer
    as_found = replace(form, separator=None, encoding=None)
    return (
        as_found if chosen.train_files == usual.train_files else form,
        as_found if chosen.holdout_file == usual.holdout_file else form,
    )


def _absolute(path: Path) -> Path:
    return STDIN_FILE if str(path) == STDIN else path.absolute()


def _as_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the settings take them. A path on the command line starts where the user stands."""
    from config.settings import HUB_PREFIX

    values = dict(options)
    if sources := values.get("train_files"):
        values["train_files"] = [
            source if source.startswith(HUB_PREFIX) else str(_absolute(Path(source))) for source in sources
        ]
    if holdout := values.get("holdout_file"):
        values["holdout_file"] = _absolute(holdout)
    if columns := values.get("columns"):
        if wrong := [column for column in columns if "=" not in column]:
            raise Problem(f"--columns {wrong[0]} must be OURS=THEIRS, for example --columns comment_text=body")
        values["columns"] = dict(column.split("=", 1) for column in columns)
    return values
