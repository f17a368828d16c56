"""Export of adapters as releases: fold, ONNX graphs, agreement with torch, merged checkpoint, model
repository.

The names below are imported on first use: `radapter_export.graph` itself needs fewer libraries than
a whole release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from radapter_serve.errors import lazily

if TYPE_CHECKING:
    from radapter_export.forms import write_merged
    from radapter_export.release import Exported, ExportedRelease, export_release
    from radapter_export.settings import ExportSettings
    from radapter_export.start import Export, export
    from radapter_serve.release.agreement import Agreement

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
__getattr__ = lazily(
    __name__,
    {
        "radapter_export.forms": ["write_merged"],
        "radapter_export.release": ["Exported", "ExportedRelease", "export_release"],
        "radapter_export.settings": ["ExportSettings"],
        "radapter_export.start": ["Export", "export"],
        "radapter_serve.release.agreement": ["Agreement"],
    },
)
