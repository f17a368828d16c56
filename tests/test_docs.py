"""Pages are right about the code: codes, exceptions, commands and flags, recipes and suites."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from starlette.applications import Starlette
from starlette.routing import Route

import radapter_client
import radapter_export
import radapter_serve
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.cli.export import _calibrated
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import read_header
from radapter_serve.gateway import app as gateway
from radapter_serve.gateway.settings import Settings
from radapter_serve.training.recipe import ALIASES, Recipe, load_recipe, ready_recipes
from tests.helpers.commands import COMMANDS, help_of
from tests.helpers.small_release import CONFIDENCE

ROOT = Path(__file__).parents[1]
GENERATED = ("cli.md", "recipe-fields.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in GENERATED
]
BESIDE = ("rivals", "benchmarks", "examples")  # folders with pages outside the site
# What translated English has: a means with "by", "Of" in front, things that act as people do, words
# with plainer ones, and a second sentence within brackets. Where a that-clause is in the place of a
# noun, no pattern finds it; nor "by" behind a participle, which may name who did it ("read by").
BEFORE = ["ed", "able", " read", " set", " made", " does", " drawn"]
BEFORE += ["one", "row", "task", "byte", "side"]
AFTER = "default|chance|name|hand|example|question|keyword|labels|URL|rounding|more|at most"
AFTER += "|up to|about"
BY = "".join(f"(?<!{end})" for end in BEFORE) + rf" by (?!{AFTER}|[±*+\d]|-\d)"
TRANSLATED = {
    "with, using or according to": BY,
    "the noun first": r"(?:^|[.;:|(] )Of (?:[a-z]|`)",
    "people act": r"\b[Vv]alidation (?:chose|chooses|took|takes)\b"
    r"|\b(?:release|recipe|index|run|photo|image)s? (?:says?|said)\b|\b(?:photo|image)s? gains?\b",
    "instead of, about, only, almost, not significantly different": r"\bin (?:the )?place of\b"
    r"|\bsome \d|\bhardly\b|\b(?:can't|cannot) be told\b|\btold apart\b",
    "two sentences": r"\([^()|]*[a-z`\d%]\. [A-Z][^()|]*\)",
    "per second": r"\b(?:answers|KiB|requests|images|photos|texts|queries|searches) a second\b",
}
FILE = r"\bbenchmarks/[\w./-]+\.(?:md|py|png)"
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its code and the targets of links, a paragraph or a row of a table a line."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"(?m)^    \S.*$", "", re.sub(r"\]\([^)]*\)", "]", text))
    return re.sub(r"\n(?![\n|#-])", " ", text)


@pytest.mark.parametrize("better", TRANSLATED)
def test_pages_are_in_plain_english(better: str) -> None:
    pages = [*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
    pages += [ROOT / "docs" / name for name in GENERATED]
    pages += [page for folder in BESIDE for page in sorted((ROOT / folder).rglob("*.md"))]
    wrong = []
    for page in pages:
        text = prose(page)
        for match in re.finditer(TRANSLATED[better], text, re.MULTILINE):
            around = text[max(0, match.start() - 30) : match.end() + 30]
            wrong.append(f"{page.relative_to(ROOT)}: {around!r}; write {better}")
    assert not wrong, "\n".join(wrong)


def test_boxes_hold_text_and_no_code() -> None:
    """Eight spaces after the title of a box make code of its first line."""
    boxes = [
        (page.name, box)
        for page in PAGES
        for box in re.findall(r"^!!! .+\n(.+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(boxes) > 3
    assert not [(name, box) for name, box in boxes if not re.match(r" {4}\S", box)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_begin_with_their_heads(page: Path) -> None:
    """A blank line ends a table: the rows below it would be text."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"\n\n( *\|.*\n)(?! *\|-)", text)


def entries(section: str) -> set[str]:
    """The names that a section of the troubleshooting page has an entry for."""
    text = TROUBLESHOOTING.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_every_code_has_its_entry() -> None:
    """Those of tasks, of the gateway, and those that the client gives of its own."""
    known = set()
    for folder in ("radapter_serve/contract/errors.py", "radapter_serve/gateway/upstream.py"):
        text = (ROOT / folder).read_text(encoding="utf-8")
        known |= set(re.findall(r'^[A-Z_]+ = "([a-z_]+)"$', text, re.MULTILINE))
    assert len(known) > 5
    for path in (ROOT / "clients").rglob("*.py"):
        known |= set(re.findall(r'code="([a-z_]+)"', path.read_text(encoding="utf-8")))
    assert entries("Codes in the server's answers") == known


def messages(path: Path) -> Iterator[str]:
    """The texts in a module; `…` stands for what an f-string puts in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Constant(str() as text):
                yield text
            case ast.JoinedStr(values):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in values]
                yield re.sub("…+", "…", "".join(map(str, parts)))


def test_messages_on_the_page_of_troubleshooting_are_the_codes() -> None:
    """Those in italics, which people search the page for."""
    folders = ("radapter_serve", "export", "clients")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = "\n".join(message for path in paths for message in messages(path))
    section = TROUBLESHOOTING.partition("\n## On the command line\n")[2]
    quoted = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", re.sub(r"\s+", " ", section))
    assert len(quoted) > 10
    assert not [message for message in quoted if message not in known]


def test_examples_of_messages_are_those_that_are_printed() -> None:
    page = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    [example] = re.findall(r'^\{"error": "(\[invalid_image\] .+)"\}$', page, re.MULTILINE)
    with pytest.raises(TaskError) as refused:
        read_header(b"12345")
    assert str(refused.value) == example
    page = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    figures: dict[str, Any] = {
        "temperature": 1.096,
        "ece_before": 0.0928,
        "ece_after": 0.0929,
        "min_score": 0.252,
    }
    sentence = _calibrated(
        dataclasses.replace(CONFIDENCE, **figures, label_ece=0.0011, false_answers=1.0)
    )
    assert f"Release 1: {sentence}" in re.sub(r"\s+", " ", page)


def test_every_exception_of_the_client_has_its_entry() -> None:
    public = (getattr(radapter_client, name) for name in radapter_client.__all__)
    classes = [kind for kind in public if inspect.isclass(kind)]
    errors = {kind.__name__ for kind in classes if issubclass(kind, Exception)}
    assert entries("Exceptions of the client") == errors - {"RAdapterClientError"}


def named_commands() -> Iterator[tuple[str, str, str, set[str]]]:
    """Page, command, subcommand (or none) and flags of every line that names a command."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(r"\b(radapter-[a-z]+(?:-[a-z]+)*)\b(?!/)([^`\n|)]*)", text):
            first = rest.split()[:1]
            subcommand = first[0] if first and re.fullmatch(r"[a-z]+(-[a-z]+)?", first[0]) else ""
            yield page.name, command, subcommand, set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest))


def test_the_page_of_what_is_stable_names_it_all() -> None:
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    assert {f"radapter-{name}" for name in re.findall(r"`radapter-([a-z-]+)`", text)} == {*COMMANDS}
    for package in (radapter_serve, radapter_export):
        [row] = re.findall(rf"^\| `{package.__name__}` \| (.+) \|$", text, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == list(package.__all__)
    [row] = re.findall(r"^\| `radapter_client` \| (.+) \|$", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) <= {*radapter_client.__all__}


def test_the_page_of_what_is_stable_and_those_of_the_api_have_the_same_names() -> None:
    published: set[str] = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE):
            package, _, last = name.rpartition(".")
            value = getattr(importlib.import_module(package), last) if package else None
            module = value if inspect.ismodule(value) else sys.modules.get(name)
            published |= set(module.__all__) if module else {last}
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    part = text.partition("**Python.**")[2].partition("**On the wire.**")[0]
    [may_change] = re.findall(r"\*\*Parts for your own programs\*\*:([^*]+)\.\n- ", text)
    names = set(re.findall(r"`(\w+)`", part + may_change)) | set(radapter_client.__all__)
    packages = {"radapter_serve", "radapter_export", "radapter_client"}
    assert published | {*radapter_serve.__all__} == names - packages


def test_every_variable_of_the_environment_has_its_row() -> None:
    """Those that the code reads, and others of the same beginnings that it names or sets."""
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    beginnings = r"(RADAPTER|OTEL|HF|OMP|OPENBLAS|QDRANT|GRADIO)_[A-Z_]+"
    named = set()
    for folder in ("radapter_serve", "export", "clients", "model_repository"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(
                        ast.Attribute(ast.Attribute(attr="environ")), [ast.Constant(name), *_]
                    ):
                        named.add(name)
                    case ast.Constant(str() as name) if re.fullmatch(beginnings, name):
                        named.add(name)
    assert len(named) > 15
    assert not named - set(re.findall(r"`([A-Z_]+)`", page))


def test_one_version_everywhere() -> None:
    version = radapter_serve.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    chart = (ROOT / "deploy" / "kubernetes" / "chart" / "Chart.yaml").read_text(encoding="utf-8")
    charted = set(re.findall(r"^(?:version|appVersion): \W?([\w.]+)", chart, re.MULTILINE))
    assert charted == {version}
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert version in [entry for entry in newest if entry != "Unreleased"][:1]


def test_commands_and_their_flags_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    commands = list(named_commands())
    # Names of images begin as those of commands.
    images = {"radapter-engine", "radapter-server"}
    assert {command for _, command, *_ in commands} - images == set(COMMANDS)
    unknown = []
    for page, command, subcommand, flags in commands:
        if command in images:
            continue
        if flags := flags - {"--help", "--help-all", "--version"}:
            if command not in ("radapter-index", "radapter-query", "radapter-release"):
                subcommand = ""
            known = help_of(*filter(None, (command, subcommand)))
            names = set(re.findall(r"--[a-z][a-z-]*", known))
            unknown += [f"{page}: {command} {subcommand} {flag}" for flag in flags - names]
    assert not unknown


def test_the_generated_pages_are_those_of_the_source() -> None:
    if int(importlib.metadata.version("tyro").split(".")[0]) < 1:
        pytest.skip("this tyro prints another help")
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = reference
    spec.loader.exec_module(reference)
    pages = {"cli.md": reference.cli_page(), "recipe-fields.md": reference.recipe_page()}
    for name, page in pages.items():
        stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert stored == page, f"docs/{name} is not up to date; write it again: make reference"


def test_the_page_of_commands_has_every_flag() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == sorted(COMMANDS)
    sections = re.findall(r"^##+ (.+)\n((?:(?!##).*\n)*)", page, re.MULTILINE)
    assert len(sections) > 20
    for title, body in sections:
        assert body.strip(), f"{title} has no description"
        if "radapter-" in title and not re.search(r"\{[a-z-]+,", help_of(*title.split())):
            printed = set(re.findall(r"^  (--[a-z][a-z-]*)", help_of(*title.split()), re.MULTILINE))
            assert printed == set(re.findall(r"^\| `(--[a-z-]+)", body, re.MULTILINE)), title
    assert "| `--top-k INT` | `10` | hits to show. |" in page
    assert "| `--base NAME:TAG` |" in page


def test_the_page_of_recipes_has_every_field_as_small_has_it() -> None:
    text = (ROOT / "docs" / "recipe-fields.md").read_text(encoding="utf-8")
    page, _, recipes = text.partition("\n## The recipes")
    row = r"^\| `(\w+)` \| (?:`(.*?)`)? \| ([^|]+) \| ([^|]*) \| (.+) \|$"
    rows = {cells[0]: cells[1:] for cells in re.findall(row, page, re.MULTILINE)}
    assert rows.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert all(len(text) > 10 for *_, text in rows.values())
    small = load_recipe("small")
    for name in ("batch_size", "epochs", "drop", "preserve", "val_fraction", "pretrained"):
        assert rows[name][0] == str(getattr(small, name))
    assert rows["learning_rate"][1] == "number, above 0"
    assert rows["crop_scale"][1] == "number, above 0, at most 1"
    assert {rows[field][2] for field in ALIASES.values()} == {f"`{alias}`" for alias in ALIASES}
    assert "| `preserve` | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 10.0 |" in recipes


def test_the_page_of_the_gateway_lists_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
    table = page.partition("\n## What is open\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`((?:GET|POST) /[^`]*)`", table))
    routes: list[Route] = []

    def noted(**settings: Any) -> Any:
        routes.extend(settings["routes"])
        return Starlette(**settings)

    monkeypatch.setattr(gateway, "Starlette", noted)
    gateway.Gateway(Settings(), lambda: pytest.fail("nothing is asked"))
    answered = {
        f"{method} {route.path.replace('{model}', 'MODEL')}"
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
        # The page says that statistics are closed, and what a version after the model asks for.
        if not route.path.endswith("/stats") and "/versions/" not in route.path
    }
    assert listed == answered


def python_blocks() -> Iterator[tuple[str, ast.Module]]:
    """Page and parsed code of every Python block, which may await."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            yield page.name, compile(block, page.name, "exec", flags=flags)


def test_python_on_the_pages_uses_what_there_is() -> None:
    nodes = [(page, node) for page, tree in python_blocks() for node in ast.walk(tree)]
    imported = [(page, node) for page, node in nodes if isinstance(node, ast.ImportFrom)]
    # Slow tests cover what pages import from other libraries.
    imports = [each for each in imported if str(each[1].module).startswith("radapter")]
    assert len(imports) > 5
    for page, node in imports:
        module = importlib.import_module(str(node.module))
        assert not [name.name for name in node.names if not hasattr(module, name.name)], page
    asked = set()
    for _, part in nodes:
        match part:
            case ast.Call(ast.Attribute(ast.Name("client"), method)):
                asked.add(method)
    assert "classify" in asked
    for kind in (radapter_client.Client, radapter_client.AsyncClient):
        assert not [name for name in asked if not hasattr(kind, name)]


def test_the_loop_on_the_page_of_adapters_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = f"local-dir:{ROOT}/radapter_serve/demo/base"
    model = open_clip.create_model_and_transforms(base)[0]
    tokenizer = open_clip.get_tokenizer(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(4, 3, *model.visual.image_size)
    texts = tokenizer(["a cat", "a dog", "a dog", "a house"])
    batches = [(images, texts, torch.tensor([0, 1, 1, 2]))] * 2
    page = (ROOT / "docs/api/adapters.md").read_text(encoding="utf-8")
    _, loop = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    loop = loop.replace('"ViT-B-32", digest, pretrained="openai"', f'"{base}", digest')
    exec(loop, {"model": model, "batches": batches})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    folded = fold(before, load_adapter(tmp_path), alpha=0.5)
    changed = {name for name, value in folded.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("visual.") for name in changed)
    assert any(not name.startswith("visual.") for name in changed)


def test_files_recipes_and_suites_that_are_named_exist() -> None:
    """Benchmarks that any page names, and links of the pages that are not on the site, too."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = re.findall(FILE, text) + re.findall(r"\brecipes/[\w./-]+\.yaml", text)
    recipes = re.findall(r"(?:--recipe |load_recipe\(\")([a-z-]+)(?![\w./-])", text)
    suites = re.findall(r"--suite ([a-z0-9-]+)(?![\w./-])", text)
    assert len(names) > 10 and "retrieval" in recipes and "pacs" in suites
    names += [f"recipes/{name}.yaml" for name in recipes]
    names += [f"recipes/suites/{name}.yaml" for name in suites]
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        names += re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_bases_of_recipes_and_of_the_page_are_open_clips_own() -> None:
    known = set(open_clip.list_pretrained())
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("## Which base to start from")[2].partition("\n\n## ")[0]
    listed = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|", table, re.MULTILINE)
    recipes = [load_recipe(name) for name in ready_recipes()]
    bases = {(recipe.architecture, str(recipe.pretrained)) for recipe in recipes}
    assert len(listed) >= 6 and {*listed, *bases} <= known


def test_the_picture_of_the_house_and_its_table_have_every_room() -> None:
    picture = (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r">([\w/]+)/</text>", picture))
    rooms = {path.parent.name for path in (ROOT / "radapter_serve").glob("*/__init__.py")}
    assert drawn == rooms | {"export/radapter_export", "clients/radapter_client"}
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    table = page.partition("\n### What is where\n")[2].partition("\n## ")[0]
    assert rooms <= set(re.findall(r"`(?:radapter_serve/)?(\w+)/`", table))
