"""Running a gateway: in this process, or as a child of another command."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.connections import Connections
from radapter_serve.gateway.settings import TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import LOG, Upstream
from radapter_serve.process import PULSE, STOPPING, SYSTEM, Clock, handled
from radapter_serve.server.launch import STOPPED, ending_with_parent, how_it_ended

PULSE_SECONDS = 1.0  # between two signs of life of a gateway
MAX_SILENCE_SECONDS = 30.0  # after which a gateway without signs of life counts as hanging
MAX_START_SECONDS = 120.0  # until the first of them


class GatewayServer:
    """A gateway on a listener, which it closes when it stops; `began` is set once it can be
    stopped.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,  # of `listen`
        connect: Callable[[], Upstream] | None = None,  # Triton at `settings.server` if None
        timeouts: Timeouts = TIMEOUTS,  # those of `listen`
        pulse: int | None = None,  # the end of a pipe, for signs of life
    ) -> None:
        self.began = threading.Event()
        if connect is None:

            def connect() -> Upstream:
                from radapter_serve.gateway.triton import Triton  # here: engines need no gRPC

                return Triton(settings.server)

        self._gateway = Gateway(settings, connect, timeouts)
        self._pulse = pulse
        try:
            self._connections = Connections(self._gateway.app, listener, settings, timeouts)
        except (OSError, ssl.SSLError) as error:
            raise RAdapterError(
                f"--tls-certificate {settings.tls_certificate} and --tls-key {settings.tls_key}:"
                f" {getattr(error, 'strerror', None) or reason(error)}; give two PEM files that"
                " belong together"
            ) from None

    def run(self) -> None:
        """Serve until `stop`, or in the main thread until SIGTERM, SIGHUP or SIGINT, which raises
        `KeyboardInterrupt`.
        """
        received: list[int] = []

        def on_signal(number: int, _: object) -> None:
            received.append(number)
            if self.began.is_set():
                self.stop()

        runner: Callable[..., None] = asyncio.run
        with contextlib.suppress(ImportError):  # Windows
            import uvloop

            runner = uvloop.run
        with handled(on_signal, signal.SIGINT, *STOPPING):
            runner(self._run(received))
        if signal.SIGINT in received[:1]:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Take no new connections, and let running requests end; works from any thread."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """Serve in a thread until the end of the block."""
        thread = threading.Thread(target=self.run, name="gateway")
        thread.start()
        try:
            self.began.wait(60)
            yield
        finally:
            self.stop()
            thread.join()

    async def _run(self, received: list[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.began.set()
        if received:
            self._stopping.set()
        beating = asyncio.ensure_future(self._beat())
        try:
            async with self._gateway.opened():
                await self._connections.serve(self._stopping)
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        while self._pulse is not None:
            # A parent that does not read, or is gone, is no reason to wait or to end.
            with contextlib.suppress(OSError):
                os.write(self._pulse, b".")
            await asyncio.sleep(PULSE_SECONDS)


def serve(settings: Settings, started: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM; `started` gets the URL once the gateway listens."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="radapter-gateway: %(message)s"
    )
    LOG.setLevel(logging.INFO)
    with listen(settings) as listener:
        allow_files(settings.max_connections)
        pulse = os.environ.get(PULSE)
        if pulse is not None:
            os.set_blocking(int(pulse), False)
        server = GatewayServer(settings, listener, pulse=None if pulse is None else int(pulse))
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.tls_certificate else "http"
        started(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        server.run()


def listen(settings: Settings, where: str = "--", timeouts: Timeouts = TIMEOUTS) -> socket.socket:
    """The socket of the settings; `where` begins the flags of host and port in messages."""
    address = settings.check(where)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server(
            (address, settings.port), family=family, backlog=settings.max_connections
        )
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)}; choose another with {where}port"
        raise RAdapterError(
            f"cannot listen on {settings.host} port {settings.port}: {why}"
        ) from None
    # Without this, an answer's body waits 40 ms for the caller to confirm the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The kernel ends the connection of a caller who takes nothing at all.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeouts.idle))
    return listener


def start(settings: Settings, pulse: int | None = None) -> subprocess.Popen[bytes]:
    """Start a gateway in a process that ends with this thread; SIGTERM stops it in order."""
    settings.check()
    command = [sys.executable, "-m", "radapter_serve.cli.gateway"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            command.append(f"--{field.name.replace('_', '-')}")
            if value is not True:
                command.append(str(value))
    return subprocess.Popen(
        ending_with_parent(command),
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches this process alone, which then stops the gateway in order.
        start_new_session=True,
        pass_fds=() if pulse is None else (pulse,),
        env=None if pulse is None else {**os.environ, PULSE: str(pulse)},
    )


class Child:
    """A gateway in a child process, which a `Supervisor` keeps up; its event loop gives signs of
    life through a pipe, which callers cannot block.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock = SYSTEM,
        start_process: Callable[[Settings, int], subprocess.Popen[bytes]] = start,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._start_process = start_process
        self._pulse: int | None = None

    def start(self) -> None:
        """Start the process, or start it again."""
        self._close_pulse()
        self._pulse, theirs = os.pipe()
        try:
            os.set_blocking(self._pulse, False)
            self._process = self._start_process(self._settings, theirs)
        finally:
            os.close(theirs)
        self._patient_until = self._clock.monotonic() + MAX_START_SECONDS

    def died(self) -> str | None:
        """Why it no longer works, or None; a process that hangs, or that a signal has stopped, is
        killed.
        """
        if (code := self._process.poll()) is not None:
            return how_it_ended(code)
        now = self._clock.monotonic()
        if self._pulse is not None:
            with contextlib.suppress(BlockingIOError):  # no sign since
                if os.read(self._pulse, 2**16):
                    self._patient_until = now + MAX_SILENCE_SECONDS
        import psutil  # here: the gateway itself does without

        if psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED:
            why = STOPPED
        elif now >= self._patient_until:
            why = "its event loop no longer answered, so it was killed"
        else:
            return None
        self._process.kill()
        self._process.wait()
        return why

    def _close_pulse(self) -> None:
        if self._pulse is not None:
            os.close(self._pulse)
            self._pulse = None

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(TIMEOUTS.drain + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pulse()


def allow_files(connections: int) -> None:
    """Raise the limit of open files, one for each connection; usually it is 1,024."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
