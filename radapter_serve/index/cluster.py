"""Embedding a collection on a Ray cluster: workers read and embed, this process writes the index.

Every worker needs this package, and sees the files and the model repository by the same paths as
this process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from radapter_serve.encoders.loaded import LoadedRelease, release_at
from radapter_serve.environment import THREADS
from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.index.collection import Read, read

_DETAILS = {"width": pa.int32(), "height": pa.int32(), "thumbnail": pa.binary()}
_AHEAD = 2  # batches that wait for a worker


class Cluster:
    """The Ray cluster at an address, such as `10.0.0.1:6379` or `auto`, whose workers embed with a
    release.
    """

    def __init__(self, address: str, loaded: LoadedRelease) -> None:
        self._loaded = loaded
        check_installed("ray", "ray")
        import ray
        import ray.data

        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise RAdapterError(
                f"no Ray cluster at {address}: {reason(error):.200}; start one with: ray start"
                " --head"
            ) from None
        self._gpus = int(resources.get("GPU", 0))
        self._workers = max(1, self._gpus or int(resources.get("CPU", 1)) - 1)  # one core reads

    def read(
        self,
        items: Sequence[tuple[str, Path, str]],
        batch: int,
        thumbnails: int,
        exif_orientation: bool,
    ) -> Iterator[list[Read]]:
        """Read and embed files in their order, batch by batch, from the id, the file, and the
        digest of the bytes that the index has; the work of a dead worker is repeated.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        table = pa.table(
            {
                "id": pa.array([os.fsencode(id) for id, _, _ in items], pa.binary()),
                "file": pa.array([os.fsencode(file) for _, file, _ in items], pa.binary()),
                "before": [before for _, _, before in items],
            }
        )
        parts = [table.slice(start, batch) for start in range(0, len(table), batch)]
        release = self._loaded.release
        embedded = ray.data.from_arrow(parts).map_batches(
            _Worker,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=self._workers, max_tasks_in_flight_per_actor=_AHEAD
            ),
            fn_constructor_kwargs={
                "origin": dict(self._loaded.origin),
                "alpha": release.alpha if release.dynamic_alpha else None,
                "digest": release.digest,
                "thumbnails": thumbnails,
                "exif_orientation": exif_orientation,
            },
            num_cpus=0 if self._gpus else 1,
            num_gpus=1 if self._gpus else None,
            max_restarts=-1,
            max_task_retries=-1,
        )
        try:
            answer: Any
            for answer in embedded.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=_AHEAD
            ):
                yield [
                    Read(
                        row["digest"],
                        details={name: row[name] for name in _DETAILS if row[name] is not None},
                        kept=row["kept"],
                        error=row["error"].decode("utf-8", "surrogateescape"),
                        vector=row["vector"] and np.asarray(row["vector"], np.float32),
                    )
                    for row in answer.to_pylist()
                ]
        except ray.exceptions.RayError as error:
            # The worker's own error in one line, without the traceback that Ray adds.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            last = lines[-1] if lines else type(error).__name__
            why = last.rpartition("RAdapterError: ")[2][:300]
            raise RAdapterError(f"the cluster can't embed: {why}") from None


class _Worker:
    """A worker: holds the release, and reads and embeds batches."""

    def __init__(
        self,
        origin: Mapping[str, str],
        alpha: float | None,
        digest: str,
        thumbnails: int,
        exif_orientation: bool,
    ) -> None:
        os.environ.setdefault(THREADS, "1")  # a worker has one core
        loaded = release_at(origin)
        if alpha is not None:
            loaded = loaded.at(alpha)
        if loaded.release.digest != digest:
            raise RAdapterError(
                f"a worker found another release at {' '.join(origin.values())} than this"
                " machine has"
            )
        self._loaded = loaded.turned(exif_orientation)
        self._thumbnails = thumbnails

    def __call__(self, batch: pa.Table) -> pa.Table:
        images = [
            read(
                os.fsdecode(row["id"]),
                Path(os.fsdecode(row["file"])),
                row["before"],
                self._loaded,
                self._thumbnails,
            )
            for row in batch.to_pylist()
        ]
        fresh = {
            image.digest: image.prepared for image in images if not (image.error or image.kept)
        }
        embeds = {}
        if fresh:
            vectors = self._loaded.embed_pixels(list(fresh.values()))
            embeds = dict(zip(fresh, vectors, strict=True))
        details = {
            name: pa.array([image.details.get(name) for image in images], kind)
            for name, kind in _DETAILS.items()
        }
        return pa.table(
            {
                "digest": [image.digest for image in images],
                "kept": [image.kept for image in images],
                "error": [image.error.encode("utf-8", "surrogateescape") for image in images],
                **details,
                "vector": pa.array(
                    [embeds.get(image.digest) for image in images], pa.list_(pa.float32())
                ),
            }
        )
