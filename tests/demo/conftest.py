"""The tests of the demo need what renders its drawings; most make do with few of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from radapter_serve.demo import data

SOME = ("airplane", "anchor", "apple", "bell", "bicycle", "camera", "car", "cat")


@pytest.fixture(scope="session", autouse=True)
def _drawings() -> None:
    if not find_spec("resvg_py"):
        pytest.skip("needs what renders the drawings: pip install -e '.[demo]'")


@pytest.fixture(scope="session")
def some(tmp_path_factory: pytest.TempPathFactory) -> data.DemoData:
    """The demo's folders, of a few classes."""
    few = {path: svg for path, svg in data.drawings().items() if path.split("/")[-2] in SOME}
    folder = tmp_path_factory.mktemp("demo") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "drawings", lambda: few)
        made = data.prepare(folder, quiet=True)
    lines = made.classes.read_text(encoding="utf-8").splitlines()
    made.classes.write_text(
        "".join(f"{line}\n" for line in lines if line.split(",")[0] in SOME), encoding="utf-8"
    )
    return made
