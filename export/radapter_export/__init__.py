"""From an adapter to a release: fold, ONNX, agreement with torch, merged checkpoint, model repository."""

from radapter_export.merged import write_merged
from radapter_export.release import Exported, Release, export_release
from radapter_serve.serving.agreement import Agreement

__all__ = ["Agreement", "Exported", "Release", "export_release", "write_merged"]
