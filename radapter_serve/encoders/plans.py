"""TensorRT engines of a model repository: a `model.plan` for the `model.onnx` of each encoder and
release, and a sidecar, `model.plan.json`, with facts about its build.

An engine runs only with the TensorRT and the kind of GPU that built it; the sidecar shows a
mismatch before a server starts. The sidecar is written last, so an engine without it is unfinished.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from radapter_serve.encoders.tensorrt import TensorRTEngine, build, find_gpu, import_tensorrt
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, lock, staged, write_text
from radapter_serve.release.agreement import Agreement, Samples, Tolerance, compare
from radapter_serve.release.config import encoders_of
from radapter_serve.release.integrity import renew_sums
from radapter_serve.release.repository import TENSORRT, check_repository

ONNX = "model.onnx"
PLAN = "model.plan"
SIDECAR = "model.plan.json"
OPT_BATCH_SIZE = 8  # rows of the batch that engines are tuned for


@dataclass(frozen=True)
class Sidecar:
    """Facts about the build of a plan: `model.plan.json`."""

    version: str  # of TensorRT, such as "11.2.1"
    gpu: str  # name of the GPU
    compute_capability: str  # of the GPU, such as "9.0"
    onnx: str  # `sha256:` of the graph and its weights
    opt_batch_size: int
    agreement: Agreement  # with torch, measured on the machine of the build

    def save(self, folder: Path) -> None:
        """Write the sidecar next to the plan."""
        write_text(folder / SIDECAR, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> Sidecar:
        """Read the sidecar; the error of a missing or damaged file names the build command."""
        path = folder / SIDECAR
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "agreement": Agreement(**values["agreement"])})
        except FileNotFoundError:
            raise RAdapterError(
                f"{folder / PLAN} is not finished, {SIDECAR} is missing; {_again(folder)}"
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RAdapterError(f"{path} is damaged: {error}; {_again(folder)}") from error


def check_plan(folder: Path) -> Sidecar:
    """Return the sidecar of the plan in a version's folder; refuses a plan that is missing,
    unfinished, or for another TensorRT, GPU or graph.
    """
    gpu = find_gpu()
    if not (folder / PLAN).is_file():
        raise RAdapterError(f"{folder / PLAN} does not exist; {_again(folder)}")
    sidecar = Sidecar.load(folder)
    version = sidecar.version
    # Triton's container has TensorRT without the Python package, and checks the version itself.
    with contextlib.suppress(RAdapterError):
        version = str(import_tensorrt().__version__)
    problem = ""
    if version != sidecar.version:
        problem = f"was built with TensorRT {sidecar.version}, this is {version}"
    elif gpu.compute_capability != sidecar.compute_capability:
        problem = (
            f"was built for compute capability {sidecar.compute_capability} ({sidecar.gpu}), "
            f"this GPU ({gpu.name}) has {gpu.compute_capability}"
        )
    elif sidecar.onnx != _digest(folder):
        problem = f"was built from another {ONNX} than lies next to it"
    if problem:
        raise RAdapterError(f"{folder / PLAN} {problem}; {_again(folder)}")
    return sidecar


@dataclass(frozen=True)
class Built:
    """One engine of a repository."""

    model: str
    version: int
    how: str  # "built" or "kept"
    size: int
    agreement: Agreement
    seconds: float


def build_engines(
    repository: Path,
    *,
    opt_batch_size: int = OPT_BATCH_SIZE,
    tolerance: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Built]:
    """Build the engines of all encoders and releases that a repository serves, and make TensorRT
    their runtime; engines that fit already are kept.
    """
    check_repository(repository)
    with lock(repository, "radapter-export or radapter-build-engine"):
        encoders = encoders_of(repository)
        if not encoders:
            raise RAdapterError(
                f"the model repository {repository} holds no encoder; make one with:"
                " radapter-export"
            )
        # Build the engines that do not fit, and keep the others.
        engines = []
        for encoder in encoders:
            bounds = encoder.facts.bounds.widened(tolerance)
            for version in encoder.versions:
                folder = encoder.folder / str(version)
                start = time.perf_counter()
                sidecar: Sidecar | None = None
                how = "kept"
                with contextlib.suppress(RAdapterError):
                    sidecar = check_plan(folder)
                if sidecar is None or sidecar.opt_batch_size != opt_batch_size:
                    how = "built"
                    sidecar = write_plan(
                        encoder.name,
                        folder,
                        opt_batch_size=opt_batch_size,
                        max_batch_size=encoder.facts.max_batch_size,
                        max_length=encoder.facts.tokenizer.context_length,
                        bounds=bounds,
                        progress=progress,
                    )
                files = [f"{encoder.name}/{version}/{file}" for file in (PLAN, SIDECAR)]
                renew_sums(repository, version, files)
                size = (folder / PLAN).stat().st_size
                seconds = time.perf_counter() - start
                engines.append(Built(encoder.name, version, how, size, sidecar.agreement, seconds))
        # All engines are there: let the configs name them.
        for encoder in encoders:
            write_text(encoder.folder / "config.pbtxt", encoder.configured(TENSORRT, None))
    return engines


def write_plan(
    name: str,
    folder: Path,
    *,
    opt_batch_size: int = OPT_BATCH_SIZE,
    max_batch_size: int,
    max_length: int,
    bounds: Tolerance,
    progress: Callable[[str], None],
) -> Sidecar:
    """Build an engine, check it against torch, and write it next to its graph."""
    gpu = find_gpu()  # first: TensorRT ends the process where there is no driver
    trt = import_tensorrt()
    label = f"building {name} of release {folder.name}"
    progress(label)
    plan = build(
        trt,
        folder / ONNX,
        opt_batch_size=opt_batch_size,
        max_batch_size=max_batch_size,
        max_length=max_length,
        progress=lambda line: progress(f"{label}: {line}"),
    )
    agreement = compare(name, TensorRTEngine(trt, plan), Samples.load(folder), bounds)
    (folder / SIDECAR).unlink(missing_ok=True)
    with staged(folder / PLAN) as path:
        path.write_bytes(plan)
    sidecar = Sidecar(
        version=str(trt.__version__),
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        onnx=_digest(folder),
        opt_batch_size=opt_batch_size,
        agreement=agreement,
    )
    sidecar.save(folder)
    return sidecar


def _digest(folder: Path) -> str:
    """Digest, `sha256:...`, of a version's graph and its weights."""
    weights = folder / f"{ONNX}.data"
    return digest_of(folder / ONNX, *([weights] if weights.exists() else []))


def _again(folder: Path) -> str:
    return f"run: radapter-build-engine {folder.parent.parent}"
