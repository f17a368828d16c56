"""`ServerConfig`: the settings of a server, which are flags of `radapter-serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from radapter_serve.errors import RAdapterError
from radapter_serve.process import total
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import AUTO, RUNTIMES
from radapter_serve.server.endpoints import Endpoints

MAX_INSTANCES = 64
MAX_WAITING = 128


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a `TritonServer`: flags of radapter-serve.

    Args:
        model_repository: folder to serve, or hf-hub:NAME, a release that radapter-export --push
            sent to the hub; can also be given as --model-repository PATH.
        endpoints: where the server listens.
        indexes: folder of the indexes that radapter-index makes; a new or replaced one is served at
            once.
        runtime: runtime of the encoders, which are first checked against torch's embeddings; auto
            takes the one that is usually fastest on such a machine; as exported if not given.
        threads: number of threads that compute in an encoder, shared by its instances; one a core
            if not given.
        instances: processes of each task, so that a slow request does not hold up the others: a
            number for all, and TASK=NUMBER for one, such as: 2 segment=4.
        max_waiting: requests that may wait for a model; beyond this number, those that have waited
            longest are refused.
        timeout: seconds to wait until all models answer.
        drain_seconds: seconds that calls under way may take when the server is stopped.
        verbose: show Triton's own messages.

    Raises:
        RAdapterError: an unknown runtime or task, or a number that is not allowed.
    """

    model_repository: tyro.conf.Positional[Path] = Path("model_repository")
    endpoints: tyro.conf.OmitArgPrefixes[Endpoints] = field(default_factory=Endpoints)
    indexes: Path = Path("indexes")
    runtime: Literal["onnxruntime", "openvino", "tensorrt", "auto"] | None = None
    threads: int | None = None
    instances: tuple[str, ...] = ()
    max_waiting: int = MAX_WAITING
    timeout: float = 120.0
    drain_seconds: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
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
