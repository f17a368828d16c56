"""`model.plan.json`, a file next to a TensorRT engine with the facts of how `model.plan` was built.

An engine runs under the TensorRT and on the kind of GPU that built it; the sidecar tells of a
mismatch before a server starts. It is written last, so an engine without it is not finished.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from radapter_serve.encoders.cuda import Gpu, find_gpu
from radapter_serve.encoders.tensorrt.engine import Options, Profile, import_tensorrt
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, staged
from radapter_serve.release.agreement import Agreement

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
    if problem := mismatch(sidecar, folder, gpu, _served_version(sidecar)):
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


def _served_version(sidecar: Sidecar) -> str:
    """The TensorRT that serves: of Python's package, or of the system, where Triton's container has
    no package.
    """
    try:
        return str(import_tensorrt().__version__)
    except RAdapterError:
        built = _numbers(sidecar.version)[0]
        for major in (built, built + 1, built - 1):
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(f"libnvinfer.so.{major}")
                number = int(library.getInferLibVersion())
                numbers = [number // 10000, number // 100 % 100, number % 100]
                with contextlib.suppress(AttributeError):  # older ones do not tell their build
                    numbers.append(int(library.getInferLibBuildVersion()))
                return ".".join(map(str, numbers))
        raise


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:4]))


def digest(folder: Path) -> str:
    """`sha256:` of a version's graph and its weights."""
    weights = folder / f"{ONNX}.data"
    return digest_of(folder / ONNX, *([weights] if weights.exists() else []))


def _again(folder: Path) -> str:
    return f"run: radapter-build-engine {folder.parent.parent}"
