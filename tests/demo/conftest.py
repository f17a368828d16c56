"""The tests of the demo need what renders its drawings; most make do with few of them."""

from __future__ import annotations

import json
import lzma
import shutil
from importlib.util import find_spec

import pytest

from radapter_serve.demo import data

SOME = ("airplane", "apple", "bell")


@pytest.fixture(scope="session", autouse=True)
def _drawings() -> None:
    if not find_spec("resvg_py"):
        pytest.skip("needs what renders the drawings: pip install -e '.[demo]'")


@pytest.fixture(scope="session")
def some(tmp_path_factory: pytest.TempPathFactory) -> data.DemoData:
    """The demo's folders, of a few classes."""
    few = {path: svg for path, svg in data.drawings().items() if path.split("/")[-2] in SOME}
    folder = tmp_path_factory.mktemp("demo") / "images"
    shipped = tmp_path_factory.mktemp("shipped")
    with lzma.open(shipped / "drawings.json.xz", "wt", encoding="utf-8") as file:
        json.dump(few, file)
    lines = data.CLASSES.read_text(encoding="utf-8").splitlines()
    (shipped / "classes.txt").write_text(
        "".join(f"{line}\n" for line in lines if line.split(",")[0] in SOME), encoding="utf-8"
    )
    shutil.copy(data.TEMPLATES, shipped)
    return data.prepare(folder, shipped=shipped)
