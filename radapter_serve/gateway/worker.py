"""One of several processes that answer at the same port: an engine with the gateway's app in front
of it. `group` starts it, tells it what to serve, and is told how it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.in_process import InProcess
from radapter_serve.gateway.metrics import SHARED, room_for_counters
from radapter_serve.gateway.run import GatewayServer, allow_files
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.engine_server import Loaded, Plan, Ready
from radapter_serve.server.processes import disk_errors

PULSE_SECONDS = 1.0


@dataclass(frozen=True)
class Begin:
    """What a worker is started with.

    Args:
        config: of the server.
        settings: of the gateway.
    """

    config: ServerConfig
    settings: Settings


class Worker:
    """Does what the group says, which is one question at a time, and says how it is.

    A question is a tuple: the name of what to do, and its arguments. The answer is
    ("say", line) any number of times, then ("done", value) or ("error", message). Without a
    question come ("pulse", why the tasks do not answer or None).

    Args:
        connection: to the group.
        begin: what it is started with.
        listener: where to answer, shared by all workers.

    Raises:
        RAdapterError: keys or a certificate that cannot be read, or a disk that is full.
    """

    def __init__(self, connection: Connection, begin: Begin, listener: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._turn = threading.Event()
        self._loaded = Loaded(begin.config)
        at_once = begin.settings.max_concurrent
        self._gateway = GatewayServer(
            begin.settings,
            listener,
            lambda: InProcess(self._loaded.engine, at_once),
            self._beat,
        )
        self._does: Mapping[str, Callable[..., Any]] = {
            "prepare": self._prepare,
            "forget": self._loaded.forget,
            "hold": self._loaded.engine.hold,
            "commit": self._loaded.commit,
            "listen": self._turn.set,
        }

    def run(self) -> None:
        """Answer callers from the moment that the group says so, until it says stop."""
        threading.Thread(target=self._hear, name="group", daemon=True).start()
        self._turn.wait()
        self._gateway.run()

    def _hear(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="group") as one_at_a_time:
            while True:
                try:
                    name, *arguments = self._connection.recv()
                except (EOFError, OSError):  # the group was killed, and nobody looks after this
                    os._exit(1)
                if name == "stop":
                    self._stop()
                elif name == "others":
                    self._gateway.gateway.others = arguments[0]
                else:
                    one_at_a_time.submit(self._do, name, arguments)

    def _do(self, name: str, arguments: list[Any]) -> None:
        try:
            self._send("done", self._does[name](*arguments))
        except RAdapterError as error:
            self._send("error", str(error))
        except Exception as error:
            self._send("error", f"{name} failed: {reason(error)}")

    def _prepare(self, plan: Plan) -> Ready:
        return self._loaded.prepare(plan, lambda line: self._send("say", line))

    def _stop(self) -> None:
        try:
            self._gateway.stop()
        except AttributeError:  # it does not answer yet
            os._exit(0)
        except RuntimeError:  # it has ended already
            pass

    async def _beat(self, gateway: Gateway) -> None:
        """Tell the group how this worker is, from the event loop that answers callers."""
        while True:
            gateway.metrics.refresh()
            self._send("pulse", await gateway.health.trouble())
            await asyncio.sleep(PULSE_SECONDS)

    def _send(self, kind: str, value: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # whose end `_hear` sees
            self._connection.send((kind, value))


def main(argv: list[str]) -> int:
    """Run a worker; the arguments are the numbers of the open connection and listener."""
    connection = Connection(int(argv[0]))
    listener = socket.socket(fileno=int(argv[1]))
    begin: Begin = connection.recv()
    allow_files(begin.settings.max_connections)
    try:
        with disk_errors(), room_for_counters(Path(os.environ[SHARED])):
            worker = Worker(connection, begin, listener)
    except RAdapterError as error:
        connection.send(("error", str(error)))
        return 1
    connection.send(("done", None))
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
