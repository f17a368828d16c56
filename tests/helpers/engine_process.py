"""An engine with the gateway's app in front of it, in a process of its own, as
`radapter-serve --engine process` has them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radapter_serve.contract.errors import Cancelled
from radapter_serve.encoders.loaded import Answered, LoadedRelease, Place, TaskSteps
from radapter_serve.engine import engine as engines
from radapter_serve.engine.engine import Engine
from radapter_serve.gateway.in_process import InProcess
from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import Settings
from radapter_serve.tasks.classify import ClassifyRequest, Ranking
from radapter_serve.tasks.embed import Labels
from radapter_serve.tasks.table import TASKS, Task, Tensors, Wants
from tests.helpers.fake_model import obey


def ordered(
    request: ClassifyRequest, cancelled: Cancelled | None
) -> TaskSteps[Answered[list[Ranking]]]:
    """Do what an image orders."""
    yield from ()
    [image] = request.images
    assert isinstance(image, bytes)
    obey(image, cancelled)
    return Answered([Ranking(["a"], np.ones(1, np.float32))], Place(0.5, None))


class Orders(Task[Any, Any]):
    """`classify` with images that nobody looks at before they are obeyed."""

    def read(self, loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[ClassifyRequest]:
        return [ClassifyRequest(inputs["image"].ravel().tolist(), Labels())]


ORDERS = Orders(**{**vars(TASKS["classify"]), "make": lambda loaded, others, seconds: ordered})


def main(
    repository: Path,
    indexes: Path,
    keys: Path | None,
    port: int,
    timeout: float,
    extra: Sequence[str] = (),
) -> None:
    """Serve until a signal; with "orders" as `extra`, `classify` obeys what images order."""
    if "orders" in extra:
        engines.TASKS = {**TASKS, "classify": ORDERS}  # type: ignore[attr-defined]
    settings = Settings(port=port, api_keys=keys, timeout=timeout)
    at_once = settings.max_concurrent
    with (
        Engine.open(repository, indexes=indexes) as engine,
        GatewayServer(settings, lambda: InProcess(engine, at_once)) as server,
    ):
        server.run()


if __name__ == "__main__":
    models, indexes, keys, port, timeout, *extra = sys.argv[1:]
    own_keys = Path(keys) if keys != "-" else None
    main(Path(models), Path(indexes), own_keys, int(port), float(timeout), extra)
