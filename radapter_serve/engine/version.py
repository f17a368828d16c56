"""A release whose encoders run in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.errors import ENCODER_FAILED, Cancelled, TaskError, redact
from radapter_serve.engine.steps import step
from radapter_serve.release.agreement import Samples, Tolerance, compare
from radapter_serve.release.release import Release
from radapter_serve.release.repository import MODELS, RUNTIMES, config_of
from radapter_serve.runtimes.encoder import Encoder
from radapter_serve.tasks.retrieve import Embedder
from radapter_serve.tasks.version import Version
from radapter_serve.threads import total

# The kind of a query (text or image), its value, its α, and whether its caller has given up, to its
# embedding, float32 [D].
Query = Callable[[str, bytes, Alpha | None, Cancelled | None], NDArray[np.float32]]


class InProcess(Version):
    """A release that an engine serves.

    `join` must be called before `retrieve` is asked.
    """

    def join(self, query: Query, others: Callable[[], Iterable[Embedder]]) -> None:
        """Say how the engine embeds queries, and which other releases it has."""
        self._query = query
        self._others = others

    @abstractmethod
    def config(self, model: str) -> Any:
        """The `ModelConfig` of a task."""

    def embedder(self) -> Embedder:
        def query(
            kind: str,
            value: bytes,
            alpha: Alpha | None = None,
            cancelled: Cancelled | None = None,
        ) -> NDArray[np.float32]:
            return self._query(kind, value, alpha, cancelled)

        return Embedder(self.release, partial(query, "text"), partial(query, "image"))

    def others(self) -> Iterable[Embedder]:
        return self._others()


class LocalVersion(InProcess):
    """One release of a model repository, by the runtime that its encoders were exported for.

    Args:
        repository: the model repository.
        number: of the release.
        indexes: folder of the indexes.
        device: number of a GPU for ONNX Runtime; None for the CPU.
        threads: that compute a batch; None for one a core.
        configs: of encoders by name, in place of the repository's, for another runtime.

    Raises:
        RAdapterError: a file is missing or broken, or the runtime can't load an encoder.
    """

    def __init__(
        self,
        repository: Path,
        number: int,
        indexes: Path,
        *,
        device: int | None = None,
        threads: int | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        folder = repository / MODELS[-1] / str(number)
        super().__init__(Release.load(folder), folder, indexes, f"{repository}@{number}")
        self._repository = repository
        self._number = number
        self._device = device
        self._configs = configs or {}
        self._threads = threads
        # At once, so that what is broken is refused before anybody asks.
        names = ["image_encoder", "text_encoder"]
        if self.release.dense:
            names.append("patch_encoder")
        self._encoders = {name: self._load(name) for name in names}

    def config(self, model: str) -> Any:
        return self._configs.get(model) or config_of(self._repository, model, self._number)

    def check(
        self, say: Callable[[str], None] = lambda line: None, *, without: Collection[str] = ()
    ) -> None:
        """Compare the encoders with torch's embeddings of the export.

        Args:
            say: called with a short line before each.
            without: names of those that have been compared already.

        Raises:
            RAdapterError: one differs by more than was allowed at the export.
        """
        agreement = self.release.agreement
        bounds = Tolerance(float(agreement["tolerance"]), float(agreement["min_cosine"]))
        for name, encoder in self._encoders.items():
            if name in without:
                continue
            named = f"{name} of release {self._number}"
            say(f"comparing {named} with torch's embeddings")
            samples = Samples.load(self._repository / name / str(self._number))
            compare(named, encoder, samples, bounds)

    def encode_images(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        return self._encode("image_encoder", pixels, alpha)

    def encode_patches(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        return self._encode("patch_encoder", pixels, alpha)

    def encode_tokens(
        self, tokens: NDArray[np.int32], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        return self._encode("text_encoder", tokens, alpha)

    def _encode(self, name: str, rows: NDArray[Any], alpha: Alpha | None) -> NDArray[np.float32]:
        encoder = self._encoders[name]
        try:
            with step(name):
                return encoder(rows) if alpha is None else encoder(rows, alpha)
        except Exception as error:  # runtimes' errors have no common base
            raise TaskError(ENCODER_FAILED, f"{name} failed: {redact(str(error))}") from error

    def _load(self, name: str) -> Encoder:
        config = self.config(name)
        runtime = str(config.backend)
        return Encoder(
            self._repository / name / str(self._number) / RUNTIMES[runtime].file,
            runtime,
            precision=self.release.precision,
            threads=total() if self._threads is None else self._threads,
            device=self._device if runtime == "onnxruntime" else None,
            parameters={key: value.string_value for key, value in config.parameters.items()},
        )
