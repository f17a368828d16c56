"""From an adapter to a release: fold, ONNX, agreement with torch, merged checkpoint, model repository.

The names below load on first use: a graph alone (`radapter_export.graph`) needs less than a whole release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_export.merged import write_merged
    from radapter_export.release import Exported, Release, export_release
    from radapter_serve.serving.agreement import Agreement

__all__ = ["Agreement", "Exported", "Release", "export_release", "write_merged"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from radapter_export import merged, release

    return getattr(merged if name == "write_merged" else release, name)
