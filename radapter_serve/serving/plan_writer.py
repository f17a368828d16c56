"""TensorRT engines for a model repository: `model.plan` beside the `model.onnx` of each encoder and release."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.serving.agreement import Agreement, Samples, compare
from radapter_serve.serving.cuda import Gpu, find_gpu
from radapter_serve.serving.engine import Engine, Options, Profile, build, import_tensorrt, refit
from radapter_serve.serving.lock import lock
from radapter_serve.serving.plan import EDITION, ONNX, PLAN, SIDECAR, Sidecar, check_plan, digest, mismatch, replace
from radapter_serve.serving.runtimes import TENSORRT, ServedEncoder, encoders_of


@dataclass(frozen=True)
class Built:
    """One engine of a repository: its model and release, whether it was built, refitted or kept, size and agreement."""

    model: str
    version: int
    how: str
    size: int
    agreement: Agreement
    seconds: float


def check_engines(repository: Path) -> dict[Path, Sidecar]:
    """`check_plan` for all that a repository serves with TensorRT, by folder."""
    return {
        (folder := encoder.folder / str(version)): check_plan(folder)
        for encoder in encoders_of(repository)
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
    """Build the engine of every encoder and release that a repository serves, and let TensorRT serve them.

    An engine is compared with torch before it is written. Configs change at the very end: whatever fails before leaves
    the repository served as it was. Engines that fit stay; one that can be refitted lends itself to later releases.

    Args:
        repository: what radapter-export has filled.
        options: how engines are built.
        tolerance: largest difference from torch, per component of a unit-length embedding; the release's own if None.
        timing_cache: file of what TensorRT measured; one in the user's cache folder if None.
        force: build those that fit, too.
        progress: called with a short line as the work goes on.

    Raises:
        RAdapterError: no GPU, no TensorRT, a graph that it cannot build, or one that differs from torch.
    """
    gpu = find_gpu()  # before TensorRT is touched
    trt = import_tensorrt()
    builder = _Builder(trt, gpu, options, tolerance, timing_cache or _timing_cache(trt, gpu), progress)
    if not repository.is_dir():
        raise RAdapterError(f"the model repository {repository} does not exist; make it with: radapter-export")
    with lock(repository, "radapter-export or radapter-build-engine"):
        encoders = encoders_of(repository)
        if not encoders:
            raise RAdapterError(f"the model repository {repository} holds no encoder; make one with: radapter-export")
        built = [builder.make(encoder, version, force) for encoder in encoders for version in encoder.versions]
        for encoder in encoders:
            replace(encoder.folder / "config.pbtxt", encoder.configured(TENSORRT, None).encode())
    return built


class _Builder:
    """Makes one engine after the other with the same TensorRT and options."""

    def __init__(
        self,
        trt: Any,
        gpu: Gpu,
        options: Options,
        tolerance: float | None,
        timing_cache: Path | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._trt, self._gpu, self._options, self._tolerance = trt, gpu, options, tolerance
        self._timing_cache, self._say = timing_cache, progress or (lambda line: None)

    def make(self, encoder: ServedEncoder, version: int, force: bool) -> Built:
        start = time.perf_counter()
        folder = encoder.folder / str(version)
        kept = None if force else self._fitting(folder)
        how, sidecar = ("kept", kept) if kept else self._new(encoder, version)
        size = (folder / PLAN).stat().st_size
        return Built(encoder.name, version, how, size, sidecar.agreement, time.perf_counter() - start)

    def _new(self, encoder: ServedEncoder, version: int) -> tuple[str, Sidecar]:
        name, facts, folder = encoder.name, encoder.facts, encoder.folder / str(version)
        rows = int(facts["max_batch_size"])
        for donor, profile in self._donors(encoder.folder, version, rows):
            self._say(f"refitting {name} of release {version}")
            # What refitting cannot do, or does wrong, building does.
            with contextlib.suppress(RAdapterError):
                if (plan := refit(self._trt, donor.read_bytes(), folder / ONNX)) is not None:
                    return "refitted", self._write(encoder, folder, plan, profile)
        label = f"building {name} of release {version}"
        self._say(label)
        plan, profile = build(
            self._trt,
            folder / ONNX,
            self._options,
            max_batch_size=rows,
            max_length=int(facts["tokenizer"]["context_length"]),
            timing_cache=self._timing_cache,
            progress=lambda line: self._say(f"{label}: {line}"),
        )
        return "built", self._write(encoder, folder, plan, profile)

    def _write(self, encoder: ServedEncoder, folder: Path, plan: bytes, profile: Profile) -> Sidecar:
        """Compare an engine with torch, then put it in place, with the sidecar last."""
        allowed = float(encoder.facts["agreement"]["tolerance"]) if self._tolerance is None else self._tolerance
        agreement = compare(encoder.name, Engine(self._trt, plan), Samples.load(folder), allowed)
        (folder / SIDECAR).unlink(missing_ok=True)
        replace(folder / PLAN, plan)
        sidecar = Sidecar(
            EDITION,
            str(self._trt.__version__),
            self._gpu.name,
            self._gpu.compute_capability,
            digest(folder),
            profile,
            self._options,
            agreement,
        )
        sidecar.save(folder)
        return sidecar

    def _fitting(self, folder: Path) -> Sidecar | None:
        with contextlib.suppress(RAdapterError):
            sidecar = Sidecar.load(folder)
            problem = mismatch(sidecar, folder, self._gpu, str(self._trt.__version__))
            if (folder / PLAN).is_file() and sidecar.options == self._options and not problem:
                return sidecar
        return None

    def _donors(self, model: Path, version: int, rows: int) -> Iterator[tuple[Path, Profile]]:
        """The newest engine of another release that could be refitted, if there is one."""
        if not self._options.refittable:
            return
        numbers = sorted((int(path.parent.name) for path in model.glob(f"*/{SIDECAR}")), reverse=True)
        for number in numbers:
            sidecar = self._fitting(model / str(number)) if number != version else None
            if sidecar and all(largest[0] == rows for _, _, largest in sidecar.profile.values()):
                yield model / str(number) / PLAN, sidecar.profile
                return


def _timing_cache(trt: Any, gpu: Gpu) -> Path | None:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radapter-serve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is read-only
        return None
    return folder / f"tensorrt-{trt.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.timing"
