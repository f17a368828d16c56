"""How many processes each task gets, and what they all need of /dev/shm."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import TASKS
from radapter_serve.server.models import ModelEntry, parsed, processes_of

MAX_INSTANCES = 64
MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")


def counts(wanted: Sequence[str]) -> dict[str, int]:
    """The instances of each task that is named.

    Args:
        wanted: each a number for all tasks, or TASK=NUMBER, which goes before it.

    Raises:
        RAdapterError: no number, or no task.
    """
    every: dict[str, int] = {}
    own: dict[str, int] = {}
    for one in wanted:
        task, _, number = one.rpartition("=")
        if task and task not in TASKS:
            raise RAdapterError(
                f"--instances {one}: there is no task {task}; there are {', '.join(TASKS)}"
            )
        if not number.isdecimal() or not 1 <= int(number) <= MAX_INSTANCES:
            raise RAdapterError(
                f"--instances {one}: allowed are 1 to {MAX_INSTANCES}, for all tasks (2) or for one"
                " (segment=2)"
            )
        (own if task else every).update(dict.fromkeys([task] if task else TASKS, int(number)))
    return {**every, **own}


def with_instances(
    models: Mapping[str, ModelEntry], wanted: Mapping[str, int]
) -> dict[str, ModelEntry]:
    """Models with so many instances of these tasks."""
    return {
        name: (
            replace(model, config=_with_count(model.config, wanted[name]))
            if name in wanted
            else model
        )
        for name, model in models.items()
    }


@dataclass(frozen=True)
class SharedMemory:
    """What /dev/shm holds, in bytes."""

    size: int
    free: int

    @classmethod
    def of_this_machine(cls) -> SharedMemory | None:
        """None if this machine has no /dev/shm."""
        if not SHARED_MEMORY.is_dir():
            return None
        found = os.statvfs(SHARED_MEMORY)
        return cls(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def check_shared_memory(
    models: Mapping[str, ModelEntry], in_python: Sequence[str], memory: SharedMemory | None
) -> str | None:
    """Compare /dev/shm with what the processes need.

    Args:
        models: all that the server loads, by name.
        in_python: backends whose models run in processes of their own.
        memory: of this machine; None if there is none.

    Returns:
        A warning where many large requests at once may need more than there is, or None.

    Raises:
        RAdapterError: the server could not even start.
    """
    stubs = rows = 0
    for model in models.values():
        config = parsed(model.config)
        if config.backend in in_python:
            stubs += processes_of(model)
        rows = max(
            [rows, *(_batch_bytes(config.max_batch_size, tensor) for tensor in config.input)]
        )
    if memory is None:
        return None
    # A stub begins with 1 MiB, and holds a batch on its way in while another is on its way out.
    least = 2 * stubs * MIB
    enough = stubs * (2 * MIB + rows)
    how = (
        f"in a container, set --shm-size={_round(enough)}m (Docker's default is 64 MB), or take"
        f" fewer --instances; elsewhere: mount -o remount,size={_round(enough)}m {SHARED_MEMORY}"
    )
    if memory.free < least:
        need = f"{stubs} model processes need {least // MIB} MiB"
        raise RAdapterError(f"{SHARED_MEMORY} has {memory.free // MIB} MiB free, and {need}; {how}")
    if memory.size < enough:
        return (
            f"{SHARED_MEMORY} has {memory.size // MIB} MiB; many full batches at once need"
            f" {enough // MIB} MiB: {how}"
        )
    return None


def _with_count(text: str, count: int) -> str:
    config = parsed(text)
    for group in config.instance_group or [config.instance_group.add()]:
        group.count = count
    return str(text_format.MessageToString(config))


def _batch_bytes(max_batch_size: int, tensor: Any) -> int:
    """Bytes of a full batch of a tensor; 0 where its size is open."""
    if tensor.data_type != model_config_pb2.TYPE_UINT8 or min(tensor.dims) < 1:
        return 0
    return int(max(1, max_batch_size) * math.prod(tensor.dims))


def _round(count: int) -> int:
    """MiB that hold so many bytes, as a power of two."""
    return int(2 ** math.ceil(math.log2(max(1, count / MIB))))
