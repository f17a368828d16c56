"""`radapter-train`: train adapters with a recipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import tyro

from radapter_serve.cli import HELP_ALL, asks_for_help, guard, options, show_help

if TYPE_CHECKING:
    from radapter_serve.training.recipe import Recipe

PROG = "radapter-train"
FIRST = (
    *("task", "architecture", "pretrained", "data", "val_data", "val_fraction", "classes"),
    *("batch_size", "epochs", "learning_rate", "alpha", "seed", "out"),
)


@dataclass
class Defaults:
    """The source of the defaults of all other options.

    Args:
        recipe: name of a recipe that comes with the package, or a YAML file; each option below
            replaces a field of it. If not given, small, or for another task the recipe of its name.
        resume: folder of a stopped run to continue with its own recipe; it needs no other option.
        base: the model to start from, which sets --architecture and --pretrained: an open_clip
            model with its weights, such as ViT-B-32:openai, local-dir:PATH or hf-hub:NAME.
    """

    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    base: Annotated[str | None, tyro.conf.arg(metavar="NAME:TAG")] = None


def main(argv: Sequence[str] | None = None) -> int:
    """Train adapters. `--recipe NAME` or FILE reads a recipe, and every field of a recipe is a
    flag.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guard(lambda: _train(arguments), arguments, prog=PROG)


def _train(arguments: list[str]) -> None:
    from radapter_serve.training.recipe import ALIASES, Recipe, ready_recipes, recipe_from

    # Replace other names of flags, such as --label-smoothing, with the fields' names.
    rest = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        field = ALIASES.get(name.removeprefix("--").replace("-", "_"))
        is_alias = field and name.startswith("--")
        rest.append(f"--{field}{equals}{value}" if is_alias else argument)
    source, rest = _take("--recipe", rest)
    run, rest = _take("--resume", rest)
    if run is None and source is None and "--resume" in rest:  # bare --resume, with --out RUN
        run, _ = _take("--out", rest)
    base, rest = _take("--base", rest)
    # Without --recipe, some of the flags decide the recipe.
    fields: dict[str, Any] = {} if base is None else {"base": base}
    if source is None and run is None:
        flags = {"task": "--task", "architecture": "--architecture", "val_data": "--val-data"}
        values = {name: _take(flag, rest)[0] for name, flag in flags.items()}
        fields |= {name: value for name, value in values.items() if value}
    recipe = recipe_from(source, run or False, **fields)
    description = (
        "Train R-Adapter on a CLIP. Recipes that come with the package:"
        f" {', '.join(ready_recipes())}."
    )
    if asks_for_help(rest):
        show_help(_in_groups(recipe, FIRST), prog=PROG, description=description)
    if HELP_ALL in rest:
        shown = {field.name for field in dataclasses.fields(recipe)} - {"resume"}  # in `Defaults`
        tyro.cli(_in_groups(recipe, shown), args=["--help"], prog=PROG, description=description)
    recipe = tyro.cli(
        Recipe, args=_nones(rest, Recipe), default=recipe, prog=PROG, description=description
    )
    recipe.check()  # before importing a library of data sets, which takes seconds
    from radapter_serve.training.start import train

    train(recipe, progress=True)


def _in_groups(recipe: Recipe, names: Collection[str]) -> type:
    """Group fields of a recipe for the help, with its values as defaults."""
    from radapter_serve.training.recipe import GROUPS

    fields: list[tuple[str, Any, Any]] = []
    for title, (sentence, group) in GROUPS.items():
        shown = options(type(recipe), set(names) & set(group.split()), recipe)
        named = tyro.conf.arg(name=title, help=sentence)
        kind = Annotated[shown, tyro.conf.OmitArgPrefixes, named]  # type: ignore[valid-type]
        if dataclasses.fields(shown):
            fields.append((title, kind, dataclasses.field(default_factory=shown)))
    return dataclasses.make_dataclass("Shown", fields, bases=(Defaults,))


def _take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Find the value of a flag, and the arguments without flag and value."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == flag:
            if value:
                return value, arguments[:index] + arguments[index + 1 :]
            if index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
                return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


def _nones(arguments: list[str], settings: type) -> list[str]:
    """Write `none`, as the help spells it, as tyro expects it: None."""
    optional = {
        f"--{name.replace('_', '-')}"
        for name, kind in get_type_hints(settings).items()
        if NoneType in get_args(kind)
    }
    flags = list(arguments)
    for index, argument in enumerate(flags):
        name, equals, value = argument.replace("_", "-").partition("=")
        if name in optional and value.lower() == "none":
            flags[index] = f"{name}{equals}None"
        elif (
            argument.lower() == "none" and index and flags[index - 1].replace("_", "-") in optional
        ):
            flags[index] = "None"
    return flags


if __name__ == "__main__":  # for `accelerate launch -m radapter_serve.cli.train`
    sys.exit(main())
