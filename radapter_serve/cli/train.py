"""`radapter-train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from radapter_serve.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Train adapters; `--recipe FILE` reads a recipe, and every field of a recipe is a flag."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guard(lambda: _train(arguments), arguments, prog="radapter-train")


def _train(arguments: list[str]) -> None:
    from radapter_serve.training import Recipe, load_recipe, train  # torch takes seconds to load

    path, rest = _take_recipe(arguments)
    recipe = load_recipe(path) if path else Recipe()
    description = "Train R-Adapter on a CLIP. --recipe FILE reads a recipe (YAML); each flag below replaces its field."
    train(tyro.cli(Recipe, args=rest, default=recipe, prog="radapter-train", description=description))


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """`--recipe FILE` comes out first: it makes the defaults of the other flags."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--recipe":
            if value:
                return value, arguments[:index] + arguments[index + 1 :]
            if index + 1 < len(arguments):
                return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


if __name__ == "__main__":  # for `accelerate launch -m radapter_serve.cli.train`
    sys.exit(main())
