"""An engine with the gateway's app in front of it, in a process of its own, as
`radapter-serve --engine process` has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from radapter_serve.engine.engine import Engine
from radapter_serve.gateway.in_process import InProcess
from radapter_serve.gateway.run import GatewayServer, allow_files, listen
from radapter_serve.gateway.settings import Settings


def main(repository: Path, indexes: Path, keys: Path, port: int, timeout: float) -> None:
    """Serve until a signal.

    Args:
        repository: the model repository.
        indexes: folder of the indexes.
        keys: file of the keys.
        port: to listen on.
        timeout: seconds that a request may take.
    """
    settings = Settings(port=port, api_keys=keys, timeout=timeout)
    with listen(settings) as listener, Engine.open(repository, indexes=indexes) as engine:
        allow_files(settings.max_connections)
        at_once = settings.max_concurrent
        GatewayServer(settings, listener, lambda: InProcess(engine, at_once)).run()


if __name__ == "__main__":
    models, indexes, keys, port, timeout = sys.argv[1:]
    main(Path(models), Path(indexes), Path(keys), int(port), float(timeout))
