"""TensorRT engines of a model repository: a `model.plan` for the `model.onnx` of each encoder and
release, and `model.plan.json`, a sidecar with the facts of how it was built.

An engine runs under the TensorRT and on the kind of GPU that built it; the sidecar shows a
mismatch before a server starts. It is written last, so an engine without it is not finished.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from radapter_serve.encoders.tensorrt import (
    Engine,
    Gpu,
    Options,
    Profile,
    build,
    find_gpu,
    import_tensorrt,
)
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, lock, staged
from radapter_serve.release.agreement import Agreement, Samples, Tolerance, compare
from radapter_serve.release.config import ServedEncoder, encoders_of
from radapter_serve.release.integrity import renew_sums
from radapter_serve.release.repository import TENSORRT

ONNX = "model.onnx"
PLAN = "model.plan"
SIDECAR = "model.plan.json"
EDITION = "tensorrt"


@dataclass(frozen=True)
class Sidecar:
    """The facts of how a plan was built: `model.plan.json`."""

    edition: str  # "tensorrt", or "tensorrt_rtx", whose engines Triton cannot load
    version: str  # of TensorRT, such as "11.2.1"
    gpu: str  # its name
    compute_capability: str  # of the GPU, such as "9.0"
    onnx: str  # `sha256:` of the graph and its weights
    profile: Profile
    options: Options
    agreement: Agreement  # with torch, measured where it was built

    def save(self, folder: Path) -> None:
        """Write it next to the plan."""
        with staged(folder / SIDECAR) as path:
            path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Sidecar:
        """Read what `save` wrote; the error of a missing or damaged file says how to build it."""
        path = folder / SIDECAR
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["options"] = Options(**values["options"])
            values["agreement"] = Agreement(**values["agreement"])
            shapes = values["profile"].items()
            values["profile"] = {name: tuple(map(tuple, limits)) for name, limits in shapes}
            sidecar = cls(**values)
            _numbers(sidecar.version), _numbers(sidecar.compute_capability)
        except FileNotFoundError:
            raise RAdapterError(
                f"{folder / PLAN} is not finished, {SIDECAR} is missing; {_again(folder)}"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RAdapterError) as error:
            raise RAdapterError(f"{path} is damaged: {error}; {_again(folder)}") from error
        return sidecar


def check_plan(folder: Path) -> Sidecar:
    """The sidecar of the plan in a folder such as `model_repository/image_encoder/1`; raises a
    `RAdapterError` where the plan can't be served here: it is missing, unfinished, or for another
    TensorRT, GPU or graph, or there is no GPU.
    """
    gpu = find_gpu()
    if not (folder / PLAN).is_file():
        raise RAdapterError(f"{folder / PLAN} does not exist; {_again(folder)}")
    sidecar = Sidecar.load(folder)

    # The TensorRT that serves: of Python's package, or of the system, where Triton's container has
    # no package.
    try:
        version = str(import_tensorrt().__version__)
    except RAdapterError:
        version = ""
        built = _numbers(sidecar.version)[0]
        for major in (built, built + 1, built - 1):
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(f"libnvinfer.so.{major}")
                number = int(library.getInferLibVersion())
                numbers = [number // 10000, number // 100 % 100, number % 100]
                with contextlib.suppress(AttributeError):  # older ones do not tell their build
                    numbers.append(int(library.getInferLibBuildVersion()))
                version = ".".join(map(str, numbers))
                break
        if not version:
            raise
    if problem := mismatch(sidecar, folder, gpu, version):
        raise RAdapterError(f"{folder / PLAN} {problem}; {_again(folder)}")
    return sidecar


def mismatch(sidecar: Sidecar, folder: Path, gpu: Gpu, version: str) -> str | None:
    """Why a plan cannot run here, or None."""
    options = sidecar.options
    built = _numbers(sidecar.version)
    here = _numbers(version)
    wanted = _numbers(sidecar.compute_capability)
    capability = _numbers(gpu.compute_capability)
    if sidecar.edition != EDITION:
        return f"is an engine of {sidecar.edition}, which Triton cannot load"
    # The fourth number is the build, which some versions lack; plans are refused for it, too.
    built, here = built[: len(here)], here[: len(built)]
    # Across majors NVIDIA promises 10 to 11 only.
    later = options.version_compatible and built <= here and here[0] - built[0] <= 1
    if built != here and not later:
        return f"was built with TensorRT {sidecar.version}, this is {version}"
    if wanted != capability and not (
        options.hardware_compatible and min(wanted, capability) >= (8, 0)
    ):
        return (
            f"was built for compute capability {sidecar.compute_capability} ({sidecar.gpu}), "
            f"this GPU ({gpu.name}) has {gpu.compute_capability}"
        )
    if sidecar.onnx != digest(folder):
        return f"was built from another {ONNX} than lies next to it"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:4]))


@dataclass(frozen=True)
class Built:
    """One engine of a repository."""

    model: str
    version: int
    how: str  # "built" or "kept"
    size: int
    agreement: Agreement
    seconds: float


def check_engines(repository: Path) -> dict[Path, Sidecar]:
    """`check_plan` for all that a repository serves with TensorRT, by folder."""
    return {
        (folder := encoder.folder / str(version)): check_plan(folder)
        for encoder in _encoders(repository)
        if encoder.runtime == TENSORRT
        for version in encoder.versions
    }


def build_engines(
    repository: Path,
    options: Options = Options(),  # noqa: B008  # frozen
    *,
    tolerance: float | None = None,
    timing_cache: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Built]:
    """Build the engine of every encoder and release that a repository serves, and let TensorRT
    serve them.

    An engine is compared with torch, to `tolerance` or the release's own, before it is written.
    Configs change at the very end: a failure before leaves the repository served as it was. Engines
    that fit stay, unless `force` builds all.
    """
    _encoders(repository)  # before a GPU is looked for
    writer = PlanWriter(options, timing_cache=timing_cache, progress=progress)
    with lock(repository, "radapter-export or radapter-build-engine"):
        encoders = _encoders(repository)
        built = []
        for encoder in encoders:
            for version in encoder.versions:
                engine = writer.write(
                    encoder.name,
                    encoder.folder / str(version),
                    max_batch_size=encoder.facts.max_batch_size,
                    max_length=int(encoder.facts.tokenizer["context_length"]),
                    bounds=(
                        encoder.bounds if tolerance is None else encoder.bounds.widened(tolerance)
                    ),
                    keep=not force,
                )
                renew_sums(
                    repository,
                    version,
                    [f"{encoder.name}/{version}/{file}" for file in (PLAN, SIDECAR)],
                )
                built.append(engine)
        for encoder in encoders:
            with staged(encoder.folder / "config.pbtxt") as path:
                path.write_text(encoder.configured(TENSORRT, None), encoding="utf-8")
    return built


class PlanWriter:
    """Writes one engine after the other, all with the same options; the arguments are those of
    `build_engines`.
    """

    def __init__(
        self,
        options: Options = Options(),  # noqa: B008  # frozen
        *,
        timing_cache: Path | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if timing_cache is not None and timing_cache.is_dir():
            raise RAdapterError(f"the timing cache {timing_cache} is a folder; name a file")
        self._gpu = find_gpu()  # before TensorRT is touched
        self._trt = import_tensorrt()
        self._options = options
        self._say = progress or (lambda line: None)
        if timing_cache is None:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            gpu = re.sub(r"[^A-Za-z0-9]+", "-", self._gpu.name)
            name = f"tensorrt-{self._trt.__version__}-{gpu}.timing"
            with contextlib.suppress(OSError):  # a home that is read-only
                folder = Path(cache) / "radapter-serve"
                folder.mkdir(parents=True, exist_ok=True)
                timing_cache = folder / name
        self._timing_cache = timing_cache

    def write(
        self,
        name: str,
        folder: Path,
        *,
        max_batch_size: int,
        max_length: int,
        bounds: Tolerance,
        keep: bool = False,
    ) -> Built:
        """Write an engine next to `model.onnx` and `samples.npz` in the folder of one version, once
        its difference from torch is within `bounds`; the sidecar comes last. With `keep`, one that
        fits stays.
        """
        start = time.perf_counter()
        label = f"{name} of release {folder.name}"

        def built(how: str, sidecar: Sidecar) -> Built:
            size = (folder / PLAN).stat().st_size
            seconds = time.perf_counter() - start
            return Built(name, int(folder.name), how, size, sidecar.agreement, seconds)

        # One that fits this machine and the options.
        if keep:
            with contextlib.suppress(RAdapterError):
                sidecar = Sidecar.load(folder)
                problem = mismatch(sidecar, folder, self._gpu, str(self._trt.__version__))
                fits = (folder / PLAN).is_file() and not problem
                if fits and sidecar.options == self._options:
                    return built("kept", sidecar)

        self._say(f"building {label}")
        plan, profile = build(
            self._trt,
            folder / ONNX,
            self._options,
            max_batch_size=max_batch_size,
            max_length=max_length,
            timing_cache=self._timing_cache,
            progress=lambda line: self._say(f"building {label}: {line}"),
        )
        agreement = compare(name, Engine(self._trt, plan), Samples.load(folder), bounds)
        (folder / SIDECAR).unlink(missing_ok=True)
        with staged(folder / PLAN) as path:
            path.write_bytes(plan)
        sidecar = Sidecar(
            edition=EDITION,
            version=str(self._trt.__version__),
            gpu=self._gpu.name,
            compute_capability=self._gpu.compute_capability,
            onnx=digest(folder),
            profile=profile,
            options=self._options,
            agreement=agreement,
        )
        sidecar.save(folder)
        return built("built", sidecar)


def _encoders(repository: Path) -> list[ServedEncoder]:
    if not repository.is_dir():
        raise RAdapterError(
            f"the model repository {repository} does not exist; make it with: radapter-export"
        )
    if not (encoders := encoders_of(repository)):
        raise RAdapterError(
            f"the model repository {repository} holds no encoder; make one with: radapter-export"
        )
    return encoders


def digest(folder: Path) -> str:
    """`sha256:` of a version's graph and its weights."""
    weights = folder / f"{ONNX}.data"
    return digest_of(folder / ONNX, *([weights] if weights.exists() else []))


def _again(folder: Path) -> str:
    return f"run: radapter-build-engine {folder.parent.parent}"
