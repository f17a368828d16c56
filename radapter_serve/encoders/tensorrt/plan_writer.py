"""TensorRT engines for a model repository: a `model.plan` for the `model.onnx` of each encoder and
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

from radapter_serve.encoders.cuda import find_gpu
from radapter_serve.encoders.tensorrt.engine import Engine, Options, build, import_tensorrt
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
from radapter_serve.files import lock, staged
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
