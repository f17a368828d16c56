"""Robust fine-tuning of CLIP with R-Adapter, from training to a served model.

The names below need the extra `train` or `export`; they load on first use, so that whoever imports
the rooms below without torch stays free of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_serve.adapter import Adapter, Metadata, attach, fold, load_adapter, save_adapter

__all__ = ["Adapter", "Metadata", "attach", "fold", "load_adapter", "save_adapter"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from radapter_serve import adapter

    return getattr(adapter, name)
