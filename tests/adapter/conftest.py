"""The small models of all families."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from radapter_serve.clip.base import Base, load_base
from tests.helpers.small_models import make_base


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The small model of a family, each time anew."""
    names: dict[str, str] = {}

    def load(family: str) -> Base:
        if family not in names:
            names[family] = make_base(family, tmp_path_factory.mktemp(family))
        return load_base(names[family])

    return load
