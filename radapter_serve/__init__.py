"""Robust fine-tuning of CLIP with R-Adapter, from training to a served model.

The names below are imported on first use, each with the extra that it needs; importing the package
alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_export.start import Export, export
    from radapter_serve.adapter import Adapter, Metadata, attach, fold, load_adapter, save_adapter
    from radapter_serve.errors import RAdapterError
    from radapter_serve.evaluation.start import Evaluation, evaluate
    from radapter_serve.model import Model
    from radapter_serve.training.recipe import Run
    from radapter_serve.training.start import train

__all__ = [
    "Adapter",
    "Evaluation",
    "Export",
    "Metadata",
    "Model",
    "RAdapterError",
    "Run",
    "attach",
    "evaluate",
    "export",
    "fold",
    "load_adapter",
    "save_adapter",
    "train",
]
__version__ = "1.0.0"

# Module that defines each name.
_HOME = {
    "Adapter": "radapter_serve.adapter",
    "Evaluation": "radapter_serve.evaluation.start",
    "Export": "radapter_export.start",
    "Metadata": "radapter_serve.adapter",
    "Model": "radapter_serve.model",
    "RAdapterError": "radapter_serve.errors",
    "Run": "radapter_serve.training.recipe",
    "attach": "radapter_serve.adapter",
    "evaluate": "radapter_serve.evaluation.start",
    "export": "radapter_export.start",
    "fold": "radapter_serve.adapter",
    "load_adapter": "radapter_serve.adapter",
    "save_adapter": "radapter_serve.adapter",
    "train": "radapter_serve.training.start",
}


def __getattr__(name: str) -> Any:
    from radapter_serve.errors import one_line

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with one_line():
        return getattr(importlib.import_module(_HOME[name]), name)
