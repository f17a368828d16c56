"""Names of a package that load on first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def attribute(package: str, home: Mapping[str, str], name: str) -> Any:
    """What the `__getattr__` of a package gives.

    Args:
        package: its name.
        home: the module of each name, whole, or from its dot on a module of the package.
        name: that is asked for.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in home:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home[name], package), name)
