"""From an adapter to a release: fold, ONNX, agreement with torch, merged checkpoint, model repository."""

from radapter_export.agreement import Agreement
from radapter_export.merged import write_merged
from radapter_export.release import Exported, Release, export_release

__all__ = ["Agreement", "Exported", "Release", "export_release", "write_merged"]
