"""`GatewayServer`: runs a gateway in the main thread, or another thread, of this process."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

from radapter_serve.errors import RAdapterError, cause, reason
from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.connections import Connections
from radapter_serve.gateway.settings import TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import Upstream
from radapter_serve.process import STOPPING, handled


class GatewayServer:
    """A gateway that listens on its address from creation on, and answers during `run`; `began` is
    set once `stop` has an effect.
    """

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], Upstream] | None = None,  # Triton at `settings.server` if None
        timeouts: Timeouts = TIMEOUTS,
    ) -> None:
        address = settings.check()
        self.began = threading.Event()
        if connect is None:

            def connect() -> Upstream:
                from radapter_serve.gateway.triton import Triton  # here: engines need no gRPC

                return Triton(settings.server)

        self._gateway = Gateway(settings, connect, timeouts)
        try:
            self._connections = Connections(self._gateway.app, settings, timeouts)
        except (OSError, ssl.SSLError) as error:
            raise RAdapterError(
                f"--tls-certificate {settings.tls_certificate} and --tls-key {settings.tls_key}:"
                f" {cause(error)}; give two PEM files that"
                " belong together"
            ) from None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (address, settings.port), family=family, backlog=settings.max_connections
            )
        except OSError as error:
            raise RAdapterError(
                f"cannot listen on {settings.host} port {settings.port}:"
                f" {os.strerror(error.errno or 0)}; choose another with --port of radapter-gateway,"
                " --gateway-port or --http-port of radapter-serve"
            ) from None
        # Otherwise the body of an answer waits 40 ms for the acknowledgement of its headers.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if settings.tls_certificate else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        # Raise the limit of open files, often 1,024, to one for each connection and 256 more.
        with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = settings.max_connections + 256
            if soft != resource.RLIM_INFINITY and soft < wanted:
                allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))

    def __enter__(self) -> GatewayServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def run(self) -> None:
        """Serve until `stop` is called or, in the main thread, until SIGTERM, SIGHUP or SIGINT
        arrives; SIGINT then raises `KeyboardInterrupt`.
        """
        received: list[int] = []

        def on_signal(number: int, _: object) -> None:
            received.append(number)
            if self.began.is_set():
                self.stop()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._stopping = asyncio.Event()
            self.began.set()
            if received:
                self._stopping.set()
            async with self._gateway.opened():
                await self._connections.serve(self._listener, self._stopping)

        runner: Callable[..., None] = asyncio.run
        with contextlib.suppress(ImportError):  # Windows
            import uvloop

            runner = uvloop.run
        with handled(on_signal, signal.SIGINT, *STOPPING):
            runner(serve())
        if signal.SIGINT in received[:1]:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Accept no new connections, and let running requests end. Thread-safe."""
        with contextlib.suppress(RuntimeError, AttributeError):  # loop has ended, or never began
            self._loop.call_soon_threadsafe(self._stopping.set)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """Serve in a thread until the end of the block. If the gateway fails, the main thread gets
        SIGTERM, and leaving the block raises `RAdapterError`.
        """
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.run()
            except BaseException as error:
                failures.append(error)
                self.began.set()
                _thread.interrupt_main(signal.SIGTERM)

        thread = threading.Thread(target=run, name="gateway")
        thread.start()
        try:
            self.began.wait(60)
            yield
        finally:
            self.stop()
            thread.join()
            for error in failures:
                raise RAdapterError(f"the gateway failed: {reason(error)}") from error
