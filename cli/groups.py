"""Groups of commands that are a command themselves: `moderato models`, and beside it `moderato models compare`."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class GroupWithDefault(TyperGroup):
    """A group whose callback is what it does where the first argument names none of its commands.

    An argument of the callback's that is called like one of the commands comes after an option:
    `moderato review --action hide next`.
    """

    def __init__(self, **attributes: Any) -> None:
        names = ", ".join(f"`moderato {attributes['name']} {name}`" for name in attributes["commands"])
        params = attributes.pop("params")
        self._default = TyperCommand(
            attributes["name"],
            callback=attributes.pop("callback"),
            params=params,
            help=attributes["help"],
            # Alone it teaches, unless it is a whole command without any argument, as `moderato models` is.
            no_args_is_help=any(param.required for param in params),
            epilog=f"See also {names}",
        )
        super().__init__(**attributes)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return self._default.make_context(info_name, args, parent, **extra)
