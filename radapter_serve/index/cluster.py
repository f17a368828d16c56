"""Embedding a collection on a Ray cluster: workers read and embed, this process writes the index.

Every worker needs this package, and sees the files and the model repository by the same paths as
this process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from radapter_serve.encoders.loaded import LoadedRelease, release_at
from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.index.collection import Read, read
from radapter_serve.process import THREADS

_AHEAD = 2  # batches at a worker, one of which waits
_BATCHES = 8  # at most, for each worker, those included that are done before an earlier one is


class Cluster:
    """The Ray cluster at an address, such as `10.0.0.1:6379` or `auto`, whose workers embed with a
    release.
    """

    def __init__(self, address: str, loaded: LoadedRelease) -> None:
        self._loaded = loaded
        check_installed("ray", "ray")
        import ray

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
        self._workers = max(1, self._gpus or int(resources.get("CPU", 1)) - 1)  # one core writes

    def read(
        self,
        items: Sequence[tuple[str, Path, str]],
        size: int,
        thumbnails: int,
        exif_orientation: bool,
    ) -> Iterator[list[Read]]:
        """Read and embed files in their order, in batches of `size`, from the id, the file, and the
        digest of the bytes that the index has; the work of a dead worker is repeated.
        """
        import ray

        release = self._loaded.release
        alpha = release.alpha if release.dynamic_alpha else None
        make: Any = ray.remote(
            num_cpus=0 if self._gpus else 1,
            num_gpus=1 if self._gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,
        )(_Worker)
        todo = deque(items[start : start + size] for start in range(0, len(items), size))
        workers = [
            make.remote(
                dict(self._loaded.origin), alpha, release.digest, thumbnails, exif_orientation
            )
            for _ in range(min(self._workers, len(todo)))
        ]
        loads = [0] * len(workers)  # batches of each worker
        waiting: dict[Any, int] = {}  # batches in the order of the files, each with its worker
        finished: set[Any] = set()
        try:
            while todo or waiting:
                # The next batch goes to the worker with the least to do.
                while todo and len(waiting) < _BATCHES * len(workers):
                    number = loads.index(min(loads))
                    if loads[number] == _AHEAD:
                        break
                    waiting[workers[number].read.remote(todo.popleft())] = number
                    loads[number] += 1
                # Any may be done next; they are given in their order.
                [batch], _ = ray.wait([batch for batch in waiting if batch not in finished])
                finished.add(batch)
                loads[waiting[batch]] -= 1
                while waiting and (first := next(iter(waiting))) in finished:
                    del waiting[first]
                    finished.remove(first)
                    yield ray.get(first)
        except ray.exceptions.RayError as error:
            # The worker's own error in one line, without the traceback that Ray adds.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            last = lines[-1] if lines else type(error).__name__
            why = last.rpartition("RAdapterError: ")[2][:300]
            raise RAdapterError(f"the cluster can't embed: {why}") from None
        finally:
            for worker in workers:
                ray.kill(worker)


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

    def read(self, items: Sequence[tuple[str, Path, str]]) -> list[Read]:
        """Read files, and embed those that the index does not have."""
        images = [read(*item, self._loaded, self._thumbnails) for item in items]
        fresh = {
            image.digest: image.prepared for image in images if not (image.error or image.kept)
        }
        embeds = {}
        if fresh:
            vectors = self._loaded.embed_pixels(list(fresh.values()))
            embeds = dict(zip(fresh, vectors, strict=True))
        return [
            dataclasses.replace(image, prepared=None, vector=embeds.get(image.digest))
            for image in images
        ]
