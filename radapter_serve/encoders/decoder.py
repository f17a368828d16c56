"""Decodes the images of requests: small ones in a few threads, large ones one at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled, TaskError
from radapter_serve.contract.preprocess import ImageFile, Preprocess, decode_into


class Decoder:
    """Images to the pixels that an encoder takes; small ones in threads, for Pillow lets go of
    the interpreter while it works.
    """

    def __init__(self, preprocess: Preprocess, threads: int) -> None:
        self._preprocess = preprocess
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def start(
        self, files: Sequence[ImageFile], cancelled: Cancelled | None = None
    ) -> Callable[[], NDArray[np.uint8]]:
        """Begin to decode the images of a request; the function that is returned waits for them,
        and gives uint8 [N, S, S, 3]. It raises the `TaskError` of the first bad image, which it
        names where there are several, or of a caller who gave up.
        """
        pixels = np.empty((len(files), *self._preprocess.size, 3), np.uint8)

        def fill(number: int) -> None:
            decode_into(files[number], self._preprocess, pixels[number], cancelled)

        # The threads take the small ones. A large one may wait for others, so this thread decodes
        # it, and it keeps no thread from the images of other callers.
        small = [number for number, file in enumerate(files) if not file.is_large]
        results: dict[int, Future[None]] = {number: Future() for number in small}
        waiting = deque(small)

        def take() -> None:
            with contextlib.suppress(IndexError):  # all are taken
                number = waiting.popleft()
                try:
                    fill(number)
                    results[number].set_result(None)
                except BaseException as error:
                    results[number].set_exception(error)
            # After the images of other callers, so that all have turns.
            if waiting:
                self._submit(take)

        def finish() -> NDArray[np.uint8]:
            try:
                for number in range(len(files)):
                    try:
                        if number in results:
                            results[number].result()
                        else:
                            fill(number)
                    except TaskError as error:
                        if len(files) == 1:
                            raise
                        which = f"image {number + 1} of {len(files)}"
                        raise TaskError(error.code, f"{which}: {error.message}") from None
            finally:
                waiting.clear()
            return pixels

        for _ in range(min(self._threads, len(small))):
            self._submit(take)
        return finish

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _submit(self, work: Callable[[], None]) -> None:
        try:
            self._pool.submit(work)
        except RuntimeError:  # the release is closed, and what is under way ends as it began
            work()
