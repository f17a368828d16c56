"""The rooms of the house: what each may import, and which of them stay free of torch."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("radapter_serve", "export/radapter_export", "clients/radapter_client")
# From the lowest floor up: a room imports from those before it, never from those after it. The
# client and the export are rooms, too.
FLOORS = [
    "radapter_client",
    "errors files process sources version",
    "contract",
    "release",
    "encoders",
    "index",
    "tasks",
    "engine",
    "triton",
    "server",
    "gateway",
    "data",
    "clip",
    "adapter",
    "evaluation",
    "training",
    "radapter_export",
    "playground",
    "model",
    "demo cli",
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
TORCH_FREE = (
    *("contract", "release", "encoders", "index", "tasks", "engine", "triton", "server"),
    *("gateway", "data", "playground"),
)
COMMANDS = ("serve", "build_engine", "eval", "export", "gateway", "index", "query", "train")
HEAVY = ("torch", "open_clip", "torchvision", "transformers", "onnxruntime", "tensorrt")


@functools.cache
def sources(folder: str) -> dict[str, Path]:
    """The modules below a folder of the checkout, by their full names."""
    package = ROOT / folder
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """The imports, calls, constants and assignments of a module."""
    kinds = (ast.ImportFrom, ast.Import, ast.Call, ast.Constant, ast.Assign)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@functools.cache
def graph() -> dict[str, set[str]]:
    """The modules of ours that each one imports: also inside functions, and by `importlib`."""
    known: dict[str, Path] = {}
    for folder in (*PACKAGES, "rivals"):
        known |= sources(folder)
    imported = {}
    for name, path in known.items():
        if name in ("radapter_serve", "radapter_export"):  # these load their names on first use
            continue
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        names: set[str] = set()
        for node in nodes(path):
            match node:
                case ast.ImportFrom(module, aliases, level):
                    parts = package[: len(package) - level + 1] if level else []
                    source = ".".join(filter(None, [*parts, module]))
                    for alias in aliases:
                        inner = f"{source}.{alias.name}"
                        names.add(inner if inner in known else source)
                case ast.Import(aliases):
                    names |= {alias.name for alias in aliases}
                case ast.Call(ast.Attribute(attr="import_module"), [ast.Constant(str() as text)]):
                    names.add(text)
        imported[name] = (names & known.keys()) - {name}
    return imported


def room_of(module: str) -> str:
    """The room of a module; empty for `radapter_serve` itself."""
    package, _, inner = module.partition(".")
    return inner.partition(".")[0] if package == "radapter_serve" else package


def test_no_room_imports_from_a_floor_above():
    rooms: dict[str, set[str]] = {}
    for name, imported in graph().items():
        room = room_of(name)
        for other in imported if room in FLOOR else ():
            other_room = room_of(other)
            assert other_room, f"{name} imports from the face of the package, above it"
            if other_room != room:
                assert FLOOR[other_room] <= FLOOR[room], f"{name} imports {other}, above it"
                rooms.setdefault(room, set()).add(other_room)
    list(TopologicalSorter(rooms).static_order())  # nor in a circle, where a floor has several


def test_no_import_circle():
    list(TopologicalSorter(graph()).static_order())  # raises CycleError, which names the circle


def test_nothing_imports_what_is_private_in_the_client_or_a_rival():
    for name, imported in graph().items():
        package = name.partition(".")[0]
        private = [other for other in imported if other.startswith("radapter_client._")]
        assert package == "radapter_client" or not private, f"{name} imports {private[0]}"
        rivals = [other for other in imported if other.startswith("rivals")]
        assert package == "rivals" or not rivals, f"{name} imports {rivals[0]}"


def test_the_client_imports_nothing_of_ours():
    for name, path in sources("clients/radapter_client").items():
        for node in nodes(path):
            match node:
                case ast.Import(names):
                    modules = [alias.name for alias in names]
                case ast.ImportFrom(module=module, level=0):
                    modules = [str(module)]
                case ast.Constant(str() as text):  # for `importlib`
                    modules = [text]
                case _:
                    continue
            for module in modules:
                ours = re.fullmatch(r"(radapter_serve|radapter_export)(\.\w+)*", module)
                assert not ours, f"{name}, line {node.lineno}, imports {module}"


def test_no_wait_reads_the_time_of_day():
    """The clock jumps as a machine wakes up; the beginning of a span alone is a time of day."""
    modules = {**sources("radapter_serve"), **sources("clients/radapter_client")}
    del modules["radapter_serve.encoders.encoder"]
    for name, path in modules.items():
        assert not re.search(r"\btime\.time(_ns)?\(", path.read_text(encoding="utf-8")), name


@pytest.mark.slow
def test_torch_is_not_imported():
    inside_triton = set(sources("radapter_serve/triton")) - {"triton", "triton.backlog"}
    client = list(sources("clients/radapter_client"))
    # The modules of the commands, and those of their first checks.
    names = [f"radapter_serve.cli.{name}" for name in COMMANDS]
    names += [f"radapter_serve.evaluation.{name}" for name in ("suite", "start")]
    names += [f"radapter_serve.training.{name}" for name in ("recipe", "start")]
    for room in TORCH_FREE:
        members = set(sources(f"radapter_serve/{room}")) - inside_triton
        assert members, room
        names += sorted(f"radapter_serve.{name}" for name in members)
    code = "import importlib, sys\n"
    for modules, others in (
        (client, (*HEAVY, "radapter_serve", "radapter_export")),
        (names, HEAVY),
    ):
        code += f"for name in {modules}:\n  importlib.import_module(name)\n"
        code += f"  assert not (heavy := {{*{others}}} & {{*sys.modules}}), (name, heavy)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-800:]


def test_what_ci_and_the_map_of_the_house_name_is_there():
    ci, makefile, contributing, how = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in (".ci/run", "Makefile", "CONTRIBUTING.md", "docs/how-it-works.md")
    )
    paths = re.findall(r"\btests/[\w./*-]*\w", ci + makefile + contributing)
    for rooms in re.findall(r"tests/\{([\w,]+)\}", ci):
        paths += [f"tests/{room}" for room in rooms.split(",")]
    named = re.findall(r"`((?:[\w.-]+/)+[\w.]*)`", contributing + how)
    paths += [path for path in named if "NAME" not in path]
    assert len(paths) > 60
    for path in paths:
        there = (ROOT / path).exists() or (ROOT / "radapter_serve" / path).exists()
        assert there, f"{path} is named, and is not there"


def test_a_line_assigns_one_value():
    """Values that change places are the exception."""
    for folder in PACKAGES:
        for name, path in sources(folder).items():
            for node in nodes(path):
                match node:
                    case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)):
                        written = {ast.unparse(target) for target in targets}
                        read = {ast.unparse(part) for value in values for part in ast.walk(value)}
                        assert written & read, f"{name}, line {node.lineno}: {ast.unparse(node)}"
