"""From an adapter to a release: fold, ONNX, agreement with torch, merged checkpoint, model
repository.

The names below load on first use: a graph alone (`radapter_export.graph`) needs less than a whole
release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from radapter_serve.lazy import attribute

if TYPE_CHECKING:
    from radapter_export.merged import write_merged
    from radapter_export.release import Exported, ExportedRelease, export_release
    from radapter_export.settings import ExportSettings
    from radapter_export.start import Export, export
    from radapter_serve.release.agreement import Agreement

_HOME = {
    "Agreement": "radapter_serve.release.agreement",
    "Export": ".start",
    "ExportSettings": ".settings",
    "Exported": ".release",
    "ExportedRelease": ".release",
    "export": ".start",
    "export_release": ".release",
    "write_merged": ".merged",
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
    return attribute(__name__, _HOME, name)
