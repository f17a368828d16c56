"""The rooms of the house: what each may import, and which of them stay free of torch."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("radapter_serve", "export/radapter_export", "clients/radapter_client")
# From the lowest floor up: a room imports from those before it, never from those after it. The
# client and the export are rooms, too.
FLOORS = [
    "radapter_client",
    "errors files process sources",
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
    "playground",
)
COMMANDS = ("serve", "build_engine", "eval", "export", "gateway", "index", "query", "train")
HEAVY = ("torch", "open_clip", "torchvision", "transformers", "onnxruntime", "tensorrt")


def sources(folder: str) -> dict[str, Path]:
    """The modules below a folder of the checkout, by their full names."""
    package = ROOT / folder
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the house that a module imports: also inside functions, for type checkers
    alone, from its own package, and by `importlib`.
    """
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            parts = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(filter(None, [*parts, node.module]))
            if source in known:
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield inner if inner in known else source
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            text = node.args[0]
            if isinstance(text, ast.Constant) and text.value in known:
                yield str(text.value)


def room_of(module: str) -> str:
    """The room of a module; empty for `radapter_serve` itself, whose names load on first use."""
    package, _, inner = module.partition(".")
    return inner.partition(".")[0] if package == "radapter_serve" else package


def test_no_room_imports_from_a_floor_above():
    modules = {name: path for folder in PACKAGES for name, path in sources(folder).items()}
    rooms: dict[str, set[str]] = {}
    for name, path in modules.items():
        if name in ("radapter_serve", "radapter_export"):  # these load their names on first use
            continue
        room = room_of(name)
        for other in imports(name, path, modules):
            other_room = room_of(other)
            if not other_room:
                continue
            assert FLOOR[other_room] <= FLOOR[room], f"{name} imports {other}, which lives above it"
            if other_room != room:
                rooms.setdefault(room, set()).add(other_room)
    list(TopologicalSorter(rooms).static_order())  # nor in a circle, where a floor has several


def test_the_client_imports_nothing_of_ours():
    for name, path in sources("clients/radapter_client").items():
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Import(names):
                    modules = [alias.name for alias in names]
                case ast.ImportFrom(module=module, level=0):
                    modules = [str(module)]
                case ast.Constant(str() as text):  # for `importlib`
                    modules = [text]
                case _:
                    continue
            ours = [
                module
                for module in modules
                if re.fullmatch(r"(radapter_serve|radapter_export)(\.\w+)*", module)
            ]
            assert not ours, f"{name}, line {node.lineno}, imports {ours[0]}"


def test_nothing_imports_what_is_private_in_the_client_or_a_rival():
    client = sources("clients/radapter_client")
    private = {name: path for name, path in client.items() if name.startswith("radapter_client._")}
    rivals = sources("rivals")
    for folder in PACKAGES:
        for name, path in sources(folder).items():
            others = [*imports(name, path, rivals)]
            if name not in client:
                others += imports(name, path, private)
            assert not others, f"{name} imports {others[0]}"


def test_no_import_circle():
    folders = (*PACKAGES, "rivals")
    modules = {name: path for folder in folders for name, path in sources(folder).items()}
    packages = {"radapter_serve", "radapter_export"}  # these two load their names on first use
    graph = {
        name: set(imports(name, path, modules)) - {name}
        for name, path in modules.items()
        if name not in packages
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


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
    # What the commands import before they know what they are asked for, and what they check first.
    names = [f"radapter_serve.cli.{name}" for name in COMMANDS]
    names += [f"radapter_serve.evaluation.{name}" for name in ("suite", "start")]
    names += [f"radapter_serve.training.{name}" for name in ("recipe", "start")]
    for room in TORCH_FREE:
        found = set(sources(f"radapter_serve/{room}")) - inside_triton
        assert found, room
        names += sorted(f"radapter_serve.{name}" for name in found)
    code = "import importlib, sys\n"
    for modules, others in (
        (client, (*HEAVY, "radapter_serve", "radapter_export")),
        (names, HEAVY),
    ):
        code += f"for name in {modules}:\n  importlib.import_module(name)\n"
        code += f"  assert not (heavy := {{*{others}}} & {{*sys.modules}}), (name, heavy)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-800:]


def test_what_ci_and_contributing_name_is_there():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"\btests/[\w./*-]*\w", ci + contributing)
    paths += [
        f"tests/{room}"
        for rooms in re.findall(r"tests/\{([\w,]+)\}", ci)
        for room in rooms.split(",")
    ]
    paths += [
        path for path in re.findall(r"`((?:[\w.-]+/)+[\w.]*)`", contributing) if "NAME" not in path
    ]
    assert len(paths) > 40
    for path in paths:
        there = [
            place / path for place in (ROOT, ROOT / "radapter_serve") if (place / path).exists()
        ]
        assert there, f"{path} is named, and is not there"


def test_a_line_assigns_one_value():
    """But for values that change places."""
    for folder in PACKAGES:
        for name, path in sources(folder).items():
            for node in ast.walk(parsed(path)):
                match node:
                    case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)):
                        written = {ast.unparse(one) for one in targets}
                        read = {ast.unparse(part) for one in values for part in ast.walk(one)}
                        assert written & read, f"{name}, line {node.lineno}: {ast.unparse(node)}"
