"""A hook of MkDocs: writes the pages `cli.md` and `recipe-fields.md` from the source whenever the
site is built, so that they can't age.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from radapter_serve.training.recipe import Recipe, load_recipe, ready_recipes

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

# Fields that the literature or other trainers know by another name.
OTHER_NAMES = {
    "accumulate": "gradient accumulation steps",
    "delta": "margin δ",
    "drop": "adapter dropping p, Eq. 7",
    "epsilon": "label smoothing ε",
    "grad_clip": "max grad norm",
    "momentum": "EMA decay m, Eq. 8",
    "preserve": "feature distillation weight",
    "preserve_words": "logit distillation weight",
    "rank": "r",
    "shots": "k-shot",
    "tracker": "report_to, log_with",
    "workers": "num_workers",
}


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
        "Every command with its flags, from the source of this version. Each takes `--help` and"
        " `--version`, and those with many flags `--help-all`. `None` as a default means: see the"
        " text. [Exit codes](stability.md#stable) are the same for all.",
    ]
    for command in commands():
        lines += _section(command)
    return "\n".join(lines) + "\n"


def recipe_page() -> str:
    """The page of every field of a recipe."""
    lines = [
        "# Recipe fields\n",
        "Every field of a recipe, from the source of this version. A field is a keyword of"
        " `train()`, a line of a YAML file and a flag (`val_fraction` is `--val-fraction`)."
        " [Train](train.md) says which ones matter.",
    ]
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for title, entries in boxes(help_of("radapter-train")):
        if not title.endswith(" options"):  # --recipe, --resume
            continue
        lines += [f"\n## {title.removesuffix(' options').capitalize()}\n"]
        lines += ["| field | default | in other words | |", "|---|---|---|---|"]
        for entry in entries:
            name = entry.head.split()[0].strip("-,").replace("-", "_")
            default = defaults.pop(name)
            kind = re.search(r"\{(?!None)([^}]*)\}", entry.head)
            values = f" One of {', '.join(kind[1].split(','))}." if kind else ""
            lines.append(
                f"| `{name}` | {_code('none' if default is None else str(default))} |"
                f" {OTHER_NAMES.get(name, '')} | {_cell(entry.text + values)} |"
            )
    for name, default in defaults.items():
        lines.append(f"| `{name}` | {_code(str(default))} |  | go on with the run in `out`. |")
    recipes = {name: load_recipe(name) for name in ready_recipes()}
    lines += ["\n## The recipes that come with the package\n", "Fields that differ between them:\n"]
    lines += [f"| field | {' | '.join(recipes)} |", f"|---|{'---|' * len(recipes)}"]
    for field in dataclasses.fields(Recipe):
        values = [getattr(recipe, field.name) for recipe in recipes.values()]
        if len({str(value) for value in values}) > 1:
            cells = ["none" if value is None else str(value) for value in values]
            lines.append(f"| `{field.name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for name, content in (("cli.md", cli_page()), ("recipe-fields.md", recipe_page())):
        files.append(File.generated(config, name, content=content))
    return files
