"""Layout of a model repository: releases, their encoders, and the encoders' runtimes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from radapter_serve.errors import RAdapterError
from radapter_serve.files import write_text
from radapter_serve.release.release import FILE, TASKS, Release

PATCH_ENCODER = "patch_encoder"  # the only optional model of a release
ENCODERS = ("image_encoder", PATCH_ENCODER, "text_encoder")
MODELS = (*ENCODERS, *TASKS)  # in the order of writing
CONFIG = "config.pbtxt"
SERVED = "served.json"  # written by the first `radapter-release`


@dataclass(frozen=True)
class Runtime:
    """Settings of a runtime in a config.pbtxt, besides `backend`, which is its name.

    `file` is loaded from a version's folder; `kind` and `gpus` say where instances run, on all GPUs
    if empty; `threads` is the parameter for the threads of an instance, `parameters` are in every
    config, and `cuda` are options of ONNX Runtime's provider on a GPU. NVIDIA's `openvino` backend
    pads every batch that Triton makes to `max_batch_size` rows, so its models are not `batched`:
    the first dimension of their tensors is any number of rows.
    """

    file: str
    kind: Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU"] = "KIND_AUTO"
    threads: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[int, ...] = ()
    cuda: Mapping[str, str] = field(default_factory=dict)
    batched: bool = True


TENSORRT = "tensorrt"
# ONNX Runtime uses TF32 by default, which differs from fp32 in the fourth digit.
CUDA_OPTIONS = {"use_tf32": "0"}
SPIN_MICROSECONDS = "session.intra_op.spin_duration_us"  # of ONNX Runtime from 1.26
RUNTIMES = {
    "onnxruntime": Runtime(
        "model.onnx",
        threads="intra_op_thread_count",
        # Waiting threads spin long enough for the next layer, and leave the cores to decoding and
        # the network between batches. radapter-serve's backend obeys this; NVIDIA's C++ backend may
        # ignore it.
        parameters={SPIN_MICROSECONDS: "20"},
        cuda=CUDA_OPTIONS,
    ),
    "openvino": Runtime(
        "model.onnx",
        kind="KIND_CPU",
        threads="INFERENCE_NUM_THREADS",
        parameters={"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"},
        batched=False,
    ),
    # The first GPU, for which engines are built and checked.
    TENSORRT: Runtime("model.plan", kind="KIND_GPU", gpus=(0,)),
}
AUTO = "auto"  # the fastest runtime


def versions_of(model: Path) -> list[int]:
    """List the versions in a model's folder, the newest last; empty if the folder is missing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(
            int(path.name) for path in model.iterdir() if path.name.isdecimal() and path.is_dir()
        )
    return []


def releases_of(repository: Path) -> list[int]:
    """List the complete releases of a model repository, the newest last."""
    task = repository / MODELS[-1]
    return [version for version in versions_of(task) if (task / str(version) / FILE).exists()]


def check_repository(repository: Path) -> None:
    """Check that a repository holds a release, or another model."""
    if not repository.is_dir():
        raise RAdapterError(
            f"the model repository {repository} does not exist; make it with: radapter-export"
        )
    if not any(versions_of(path.parent) for path in repository.glob(f"*/{CONFIG}")):
        raise RAdapterError(
            f"the model repository {repository} holds no release; make one with: radapter-export"
        )


def split_repository(repository: str | Path) -> tuple[str, str]:
    """Split `DIR@N` into the folder and the number, which is empty if it is missing."""
    path, at, number = str(repository).rpartition("@")
    named = at and number.isdecimal() and not Path(repository).is_dir()
    return (path, number) if named else (str(repository), "")


def find_release(repository: str | Path) -> Path:
    """Find the folder, in the task `classify`, of release N of `DIR@N`, or of the served one (the
    highest, if there are several).
    """
    path, number = split_repository(repository)
    folder = Path(path)
    served = [int(number)] if number else Served.load(folder).releases
    return folder / MODELS[-1] / str(require_known(folder, served)[-1])


def require_known(repository: Path, releases: Sequence[int]) -> list[int]:
    """Sort numbers of releases; raises an error for one that the repository does not hold."""
    known = releases_of(repository)
    if not known:
        raise RAdapterError(
            f"no release in the model repository {repository}; make one with: radapter-export"
        )
    for version in releases:
        if version not in known:
            raise RAdapterError(
                f"no release {version} in {repository}; it holds {format_list(known)}"
            )
    return sorted(set(releases))


def format_list(versions: Sequence[int]) -> str:
    """Format numbers as text, such as "1, 2"."""
    return ", ".join(map(str, versions)) or "none"


def releases_with_images(
    repository: Path, image_digest: str, alpha: float, precision: str | None
) -> list[int]:
    """List the releases of a repository that embed images as a digest says, at an α, if those in
    fp32 are computed in a precision.
    """
    versions = []
    for version in releases_of(repository):
        with contextlib.suppress(RAdapterError):
            release = Release.load(repository / MODELS[-1] / str(version))
            if release.dynamic_alpha:
                release = release.at(alpha)
            if release.precision == "fp32":
                release = release.computed_in(precision)
            if release.image_digest == image_digest:
                versions.append(version)
    return versions


@dataclass(frozen=True)
class Served:
    """The served releases, of which the highest is the default, and those before them."""

    releases: tuple[int, ...]
    before: tuple[int, ...] = ()

    @classmethod
    def load(cls, repository: Path) -> Served:
        """Read `served.json`; without it, the releases in the configs, else the newest export."""
        path = repository / SERVED
        known = releases_of(repository)
        if not path.exists():
            # The versions that the config asks Triton to serve.
            config = repository / MODELS[-1] / CONFIG
            text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
            numbers = re.findall(r"\bversions\s*:\s*\[?([\d,\s]+)", text)
            wanted = {int(number) for part in numbers for number in re.findall(r"\d+", part)}
            served = [version for version in known if version in wanted]
            return cls(tuple(served or known[-1:]))
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            releases = sorted({int(number) for number in text["releases"]})
            before = sorted({int(number) for number in text["before"]})
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise RAdapterError(
                f"could not read {path}: {error}; choose what is served: radapter-release load N"
            ) from error
        missing = [version for version in releases if version not in known]
        if missing or not releases:
            raise RAdapterError(
                f"{path} says that release {format_list(missing)} is served, and {repository} holds"
                f" {format_list(known)}; choose one of them: radapter-release load N"
            )
        return cls(tuple(releases), tuple(version for version in before if version in known))

    def next(self, releases: Sequence[int]) -> Served:
        """The state after these releases take over."""
        return Served(tuple(sorted(set(releases))), self.releases)

    def back(self) -> Served:
        """The state after a rollback."""
        if not self.before:
            raise RAdapterError(
                "no release was served before this one; name one: radapter-release load N"
            )
        return self.next(self.before)

    def save(self, repository: Path) -> None:
        """Write `served.json`, which the next start reads."""
        values = {"releases": self.releases, "before": self.before}
        write_text(repository / SERVED, json.dumps(values))
