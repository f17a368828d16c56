"""Gateways: in this process in front of a real tritonserver, or in a process alone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from subprocess import DEVNULL, Popen
from typing import Any

from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import Settings
from radapter_serve.process import handled
from radapter_serve.server.triton_server import TritonServer


@contextmanager
def gateway(server: TritonServer, **options: Any) -> Iterator[str]:
    """A gateway before a server; its URL."""
    settings = Settings(port=0, server=server.grpc_url.removeprefix("grpc://"), **options)
    with GatewayServer(settings) as running, running.in_thread():
        yield running.url.replace("127.0.0.1", "localhost")


def start(settings: Settings) -> Popen[bytes]:
    """A gateway in a process."""
    command = [sys.executable, "-m", "radapter_serve.cli.gateway"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            command += [f"--{field.name.replace('_', '-')}", str(value)]
    return Popen(command, stdin=DEVNULL)


def until_asked(command: Callable[[], int], ask: Callable[[], None]) -> int:
    """The exit status of a command in this thread, which gets SIGTERM once `ask` has ended in
    another one.
    """

    def asking() -> None:
        try:
            ask()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with handled(lambda *_: None, signal.SIGTERM), ThreadPoolExecutor(1) as thread:
        answer = thread.submit(asking)
        status = command()
        answer.result()
    return status
