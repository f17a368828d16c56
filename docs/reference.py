"""Writes the pages `cli.md` and `recipe-fields.md` from the source (`make reference`); a test
compares them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from radapter_serve.training.recipe import ALIASES, Recipe, load_recipe, ready_recipes

PAGES = Path(__file__).parent
DEFAULT_RECIPE = "small"  # what `radapter-train --data photos` takes

# Fields that the literature or other trainers know by another name.
OTHER_NAMES = {
    "accumulate": "gradient accumulation steps",
    "grad_clip": "max grad norm",
    "preserve": "feature distillation weight",
    "preserve_words": "logit distillation weight",
    "rank": "r",
    "shots": "k-shot",
    "tracker": "report_to, log_with",
    "workers": "num_workers",
}
TYPES = {
    bool: "`true`, `false`",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    NoneType: "`none`",
}
# The bounds of numbers: their name, the side that they bound, and its word.
BOUNDS = (
    ("ge", "low", "at least"),
    ("gt", "low", "above"),
    ("le", "top", "at most"),
    ("lt", "top", "below"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A flag, argument or subcommand in the help of a command."""

    head: str
    default: str
    text: str


def commands() -> dict[str, importlib.metadata.EntryPoint]:
    """The commands that the package installs, by name."""
    points = importlib.metadata.distribution("radapter-serve").entry_points
    return {point.name: point for point in sorted(points) if point.group == "console_scripts"}


def help_of(command: str, *arguments: str) -> str:
    """The help of a command or subcommand, with all flags, in lines of 110 columns."""
    text = _printed(command, *arguments, "--help")
    return _printed(command, *arguments, "--help-all") if "--help-all" in text else text


def _printed(command: str, *arguments: str) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # with an encoding tyro draws boxes
    point = commands()[command]
    main = getattr(importlib.import_module(point.module), point.attr)
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS="110", NO_COLOR="1")
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*arguments])
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    out.flush()
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


def boxes(text: str) -> Iterator[tuple[str, list[Entry]]]:
    """The boxes of a help text: title and entries."""
    for title, body in re.findall(r"^╭─ ([^─]+?) ─+╮\n(.*?)^╰", text, re.MULTILINE | re.DOTALL):
        lines = [line.removeprefix("│ ").removesuffix("│").rstrip() for line in body.splitlines()]
        if rules := [index for index, line in enumerate(lines) if line.startswith("───")]:
            lines = lines[rules[0] + 1 :]  # above it stands what the group is
        heads: list[list[str]] = []
        for line in lines:
            if line[:1].strip():
                heads.append(re.split(r" {2,}", line, maxsplit=1))
            elif heads and line.strip():
                heads[-1].append(line.strip())
        entries = []
        for head, *rest in heads:
            joined = " ".join(rest)
            found = re.search(r" \((?:default: (.*)|(required|repeatable))\)$", joined)
            default = (found[1] or found[2] or "") if found else ""
            entries.append(Entry(head, default, joined[: found.start()] if found else joined))
        yield title, entries


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _section(command: str, *subcommand: str) -> Iterator[str]:
    """The lines of a command, and of its subcommands."""
    text = help_of(command, *subcommand)
    words = re.search(r"\{([a-z,-]+)\}$", text.splitlines()[0])
    description = re.sub(r"\s+", " ", text.partition("\n\n")[2].partition("╭")[0]).strip()
    yield f"\n{'###' if subcommand else '##'} {' '.join((command, *subcommand))}\n"
    yield f"{_cell(description)}\n"
    for title, entries in [] if words else boxes(text):
        rows = [entry for entry in entries if not entry.head.startswith("-h,")]
        if not rows:
            continue
        if title not in ("options", "positional arguments"):
            yield f"**{title.removesuffix(' options').capitalize()}**\n"
        yield "| flag or argument | default | |\n|---|---|---|"
        for row in rows:
            yield f"| {_code(row.head)} | {_code(row.default)} | {_cell(row.text)} |"
        yield ""
    for word in words[1].split(",") if words else []:
        yield from _section(command, *subcommand, word)


def cli_page() -> str:
    """The page of every command with its flags."""
    lines = [
        "# Commands\n",
        "Every command with its flags. Each takes `--help` and `--version`, and those with many"
        " flags `--help-all`. `None` as a default means: see the text. [Exit"
        " codes](stability.md#stable) are the same for all.",
    ]
    for command in commands():
        lines += _section(command)
    return "\n".join(lines) + "\n"


def allowed(kind: Any) -> str:
    """Describe the values that a field of this type takes."""
    values = typing.get_args(kind)
    match typing.get_origin(kind):
        case origin if origin is Literal:
            return ", ".join(f"`{value}`" for value in values)
        case origin if origin in (Union, UnionType):
            return ", or ".join(allowed(value) for value in values)
        case origin if origin is Annotated:
            bounds = {}
            for note in values[1:]:
                for bound in getattr(note, "metadata", ()):
                    for key, side, word in BOUNDS:
                        if hasattr(bound, key):
                            bounds[side] = f"{word} {getattr(bound, key)}"
            inner = allowed(values[0])
            return ", ".join([inner, *(bounds[side] for side in sorted(bounds))])
        case _:
            return TYPES[kind]


def recipe_page() -> str:
    """The page of every field of a recipe."""
    lines = [
        "# Recipe fields\n",
        "Every field of a recipe. A field is a keyword of `train()`, a line of a YAML file and a"
        " flag (`val_fraction` is `--val-fraction`). The second column is what `radapter-train"
        f" --data photos` takes, the recipe `{DEFAULT_RECIPE}`; [other"
        " recipes](#the-recipes-that-come-with-the-package) have their own values."
        " [Train](train.md) says which fields matter.",
    ]
    default = load_recipe(DEFAULT_RECIPE)
    kinds = typing.get_type_hints(Recipe, include_extras=True)
    shown = set()
    for title, entries in boxes(help_of("radapter-train")):
        if not title.endswith(" options"):  # --recipe, --resume, --base
            continue
        lines += [f"\n## {title.removesuffix(' options').capitalize()}\n"]
        lines += [f"| field | `{DEFAULT_RECIPE}` | allowed | in other words | |"]
        lines += ["|---|---|---|---|---|"]
        for entry in entries:
            name = entry.head.split()[0].strip("-,").replace("-", "_")
            shown.add(name)
            others = [f"`{alias}`" for alias, field in ALIASES.items() if field == name]
            others += [OTHER_NAMES[name]] if name in OTHER_NAMES else []
            lines.append(
                f"| `{name}` | {_code(_spelled(getattr(default, name)))} | {allowed(kinds[name])} |"
                f" {', '.join(others)} | {_cell(entry.text)} |"
            )
    for name in kinds.keys() - shown:
        value = _spelled(getattr(default, name))
        lines.append(
            f"| `{name}` | `{value}` | {allowed(kinds[name])} |  | continue the run in `out`. |"
        )
    lines.append(
        "\n`base` (`--base NAME:TAG`) sets `architecture` and `pretrained` together. `none` in a"
        " YAML file is `null`, in Python `None`."
    )
    recipes = {name: load_recipe(name) for name in ready_recipes()}
    lines += ["\n## The recipes that come with the package\n", "Fields that differ between them:\n"]
    lines += [f"| field | {' | '.join(recipes)} |", f"|---|{'---|' * len(recipes)}"]
    for field in dataclasses.fields(Recipe):
        values = [_spelled(getattr(recipe, field.name)) for recipe in recipes.values()]
        if len(set(values)) > 1:
            lines.append(f"| `{field.name}` | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


if __name__ == "__main__":
    (PAGES / "cli.md").write_text(cli_page(), encoding="utf-8")
    (PAGES / "recipe-fields.md").write_text(recipe_page(), encoding="utf-8")
