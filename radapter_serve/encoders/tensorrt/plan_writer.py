"""TensorRT engines for a model repository: `model.plan` beside the `model.onnx` of each encoder and
release.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_serve.encoders.cuda import Gpu, find_gpu
from radapter_serve.encoders.tensorrt.engine import Engine, Options, Profile, build, import_tensorrt
from radapter_serve.encoders.tensorrt.plan import (
    EDITION,
    ONNX,
    PLAN,
    SIDECAR,
    Sidecar,
    check_plan,
    digest,
    mismatch,
)
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.lock import lock
from radapter_serve.release.agreement import Agreement, Samples, Tolerance, compare
from radapter_serve.release.config import ServedEncoder, encoders_of
from radapter_serve.release.integrity import renew_sums
from radapter_serve.release.repository import TENSORRT


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

    An engine is compared with torch before it is written. Configs change at the very end: a failure
    before leaves the repository served as it was. Engines that fit stay.

    Args:
        repository: what radapter-export has filled.
        options: how engines are built.
        tolerance: largest difference from torch, per component of a unit-length embedding; the
            release's own if None. The cosine's bound widens with it.
        timing_cache: file of what TensorRT measured; one in the user's cache folder if None.
        force: build all, those that fit, too.
        progress: called with a short line as the work goes on.
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
        self._timing_cache = timing_cache or _timing_cache(self._trt, self._gpu)

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
        """Write an engine beside `model.onnx` and `samples.npz` in the folder of one version, once
        its difference from torch is within `bounds`; the sidecar comes last. With `keep`, one that
        fits stays.
        """
        start = time.perf_counter()
        label = f"{name} of release {folder.name}"

        def built(how: str, sidecar: Sidecar) -> Built:
            size = (folder / PLAN).stat().st_size
            seconds = time.perf_counter() - start
            return Built(name, int(folder.name), how, size, sidecar.agreement, seconds)

        if keep and (kept := self._fitting(folder)):
            return built("kept", kept)
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
        return built("built", self._put(folder, plan, profile, agreement))

    def _put(self, folder: Path, plan: bytes, profile: Profile, agreement: Agreement) -> Sidecar:
        (folder / SIDECAR).unlink(missing_ok=True)
        with staged(folder / PLAN) as path:
            path.write_bytes(plan)
        gpu = self._gpu
        version = str(self._trt.__version__)
        onnx = digest(folder)
        sidecar = Sidecar(
            EDITION,
            version,
            gpu.name,
            gpu.compute_capability,
            onnx,
            profile,
            self._options,
            agreement,
        )
        sidecar.save(folder)
        return sidecar

    def _fitting(self, folder: Path) -> Sidecar | None:
        """The sidecar of an engine that fits this machine and the options, or None."""
        with contextlib.suppress(RAdapterError):
            sidecar = Sidecar.load(folder)
            problem = mismatch(sidecar, folder, self._gpu, str(self._trt.__version__))
            if (folder / PLAN).is_file() and sidecar.options == self._options and not problem:
                return sidecar
        return None


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


def _timing_cache(trt: Any, gpu: Gpu) -> Path | None:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radapter-serve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is read-only
        return None
    return folder / f"tensorrt-{trt.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.timing"
