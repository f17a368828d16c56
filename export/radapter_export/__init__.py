"""From an adapter to a release: fold, ONNX, agreement with torch, merged checkpoint, model
repository.

The names below load on first use: a graph alone (`radapter_export.graph`) needs less than a whole
release.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_export.merged import write_merged
    from radapter_export.release import Exported, ExportedRelease, export_release
    from radapter_export.settings import ExportSettings
    from radapter_export.start import Export, export
    from radapter_serve.release.agreement import Agreement

_ELSEWHERE = {
    "Agreement": "radapter_serve.release.agreement",
    "Export": "radapter_export.start",
    "ExportSettings": "radapter_export.settings",
    "export": "radapter_export.start",
    "write_merged": "radapter_export.merged",
}

__all__ = [
    "Agreement",
    "Export",
    "ExportSettings",
    "Exported",
    "ExportedRelease",
    "export",
    "export_release",
    "write_merged",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "radapter_export.release")), name)
