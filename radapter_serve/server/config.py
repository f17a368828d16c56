"""The settings of a server, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import AUTO, RUNTIMES
from radapter_serve.release.served import Served
from radapter_serve.server.backlog import MAX_WAITING
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.instances import counts
from radapter_serve.threads import total


@dataclass(frozen=True)
class ServerConfig:
    """What a `TritonServer` is started with. Messages name the flags of radapter-serve.

    Args:
        model_repository: folder that radapter-export has filled.
        endpoints: where the server listens.
        releases: numbers of the releases to serve; None serves those of `served.json`, or those of
            the newest export.
        indexes: folder of the indexes for `retrieve`; it need not exist yet.
        runtime: runs the encoders, once its embeddings have been compared with torch's:
            onnxruntime, openvino or tensorrt. "auto" measures the runtimes and takes the fastest.
            None keeps the runtime of the export.
        threads: threads that compute in an encoder, shared by its instances; None takes one for
            each core.
        instances: number of processes of each task, as a number for all tasks or TASK=NUMBER. A
            task that is not named has one, as its config says. With two, a slow request does not
            hold up the other requests of its task.
        max_waiting: requests that may wait for a model; if there are more, those that have waited
            longest are refused.
        timeout: seconds to wait until every model answers.
        drain_seconds: seconds that running calls may take when the server is stopped.
        log: file for the server's messages; None keeps them only for the report of a failure.
        verbose: let the server write its messages to this process's stderr instead.

    Raises:
        RAdapterError: an unknown runtime or task, or a number that is not allowed.
    """

    model_repository: Path
    endpoints: Endpoints = field(default_factory=Endpoints)
    releases: Sequence[int] | None = None
    indexes: Path = Path("indexes")
    runtime: str | None = None
    threads: int | None = None
    instances: Sequence[str] = ()
    max_waiting: int = MAX_WAITING
    timeout: float = 120.0
    drain_seconds: int = 10
    log: Path | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        # The server's processes have another current folder.
        object.__setattr__(self, "model_repository", self.model_repository.resolve())
        object.__setattr__(self, "indexes", self.indexes.resolve())
        if not self.timeout > 0:
            raise RAdapterError(f"--timeout is {self.timeout:g}; allowed are seconds above 0")
        if self.drain_seconds < 1:
            raise RAdapterError(
                f"--drain-seconds is {self.drain_seconds}; allowed are whole seconds from 1"
            )
        if self.runtime not in (None, AUTO, *RUNTIMES):
            raise RAdapterError(
                f"--runtime is {self.runtime}; allowed are {', '.join((*RUNTIMES, AUTO))}"
            )
        if self.threads is not None and self.threads < 1:
            raise RAdapterError(f"--threads is {self.threads}; allowed are 1 and more")
        if self.max_waiting < 1:
            raise RAdapterError(f"--max-waiting is {self.max_waiting}; allowed are 1 and more")
        counts(self.instances)

    def wanted(self) -> Served:
        """The releases that a server begins with.

        Raises:
            RAdapterError: as `Served.load`.
        """
        if self.releases is None:
            return Served.load(self.model_repository)
        return Served(tuple(sorted(self.releases)))

    @property
    def encoder_threads(self) -> int:
        """Threads that compute in an encoder."""
        return self.threads or total()

    @property
    def instance_counts(self) -> dict[str, int]:
        """The number of processes of each task that `instances` names."""
        return counts(self.instances)
