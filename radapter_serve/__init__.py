"""Robust fine-tuning of CLIP with R-Adapter, from training to a served model.

The names below are imported on first use, each with the extra that it needs; importing only the
package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from radapter_serve.errors import RAdapterError, lazily
from radapter_serve.version import __version__ as __version__

if TYPE_CHECKING:
    from radapter_export.start import Export, export
    from radapter_serve.adapter import Adapter, Metadata, attach, fold, load_adapter, save_adapter
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

__getattr__ = lazily(
    __name__,
    {
        "radapter_export.start": ["Export", "export"],
        "radapter_serve.adapter": [
            *("Adapter", "Metadata", "attach", "fold", "load_adapter", "save_adapter"),
        ],
        "radapter_serve.evaluation.start": ["Evaluation", "evaluate"],
        "radapter_serve.model": ["Model"],
        "radapter_serve.training.recipe": ["Run"],
        "radapter_serve.training.start": ["train"],
    },
)
