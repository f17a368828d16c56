"""`ServerConfig`: the settings of a server, checked on creation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from radapter_serve.errors import RAdapterError
from radapter_serve.process import total
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import AUTO, RUNTIMES
from radapter_serve.server.endpoints import Endpoints

MAX_INSTANCES = 64
MAX_WAITING = 128


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a `TritonServer`. Error messages name the flags of radapter-serve.

    Args:
        model_repository: folder that radapter-export has filled.
        endpoints: where the server listens.
        indexes: folder of the indexes for `retrieve`; it need not exist yet.
        runtime: runtime of the encoders: onnxruntime, openvino or tensorrt; unless it is that of
            the export, its embeddings are first compared with torch's. "auto" takes the runtime
            that is usually fastest on this machine and agrees with torch. None keeps the runtime of
            the export.
        threads: threads that compute in an encoder, shared by its instances; None takes one for
            each core.
        instances: number of processes of each task, as a number for all tasks or TASK=NUMBER. A
            task that is not named has one, as its config says. With two, a slow request does not
            hold up the other requests of its task.
        max_waiting: requests that may wait for a model; if there are more, the ones that have
            waited longest are refused.
        timeout: seconds to wait until every model answers.
        drain_seconds: seconds that running calls may take when the server is stopped.
        verbose: let the server write its log to this process's stderr, instead of the file from
            which the reason of a failure is read.

    Raises:
        RAdapterError: an unknown runtime or task, or a number that is not allowed.
    """

    model_repository: Path
    endpoints: Endpoints = field(default_factory=Endpoints)
    indexes: Path = Path("indexes")
    runtime: str | None = None
    threads: int | None = None
    instances: Sequence[str] = ()
    max_waiting: int = MAX_WAITING
    timeout: float = 120.0
    drain_seconds: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
        # Make paths absolute: the server's processes have another working directory.
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
        for name in ("threads", "max_waiting"):
            number = getattr(self, name)
            if number is not None and number < 1:
                flag = name.replace("_", "-")
                raise RAdapterError(f"--{flag} is {number}; allowed are 1 and more")
        self.instance_counts()

    @property
    def encoder_threads(self) -> int:
        """Threads that compute in an encoder: `threads`, or the default for this machine."""
        return self.threads or total()

    def instance_counts(self) -> dict[str, int]:
        """Number of processes of each task in `instances`; TASK=NUMBER overrides a number for
        all.
        """
        counts: dict[str, int] = {}
        for setting in sorted(self.instances, key=lambda setting: "=" in setting):
            task, _, number = setting.rpartition("=")
            if task and task not in TASKS:
                raise RAdapterError(
                    f"--instances {setting}: there is no task {task}; there are {', '.join(TASKS)}"
                )
            if not number.isdecimal() or not 1 <= int(number) <= MAX_INSTANCES:
                raise RAdapterError(
                    f"--instances {setting}: allowed are 1 to {MAX_INSTANCES}, for all tasks (2) or"
                    " for one (segment=2)"
                )
            counts.update(dict.fromkeys([task] if task else TASKS, int(number)))
        return counts
