"""Several processes that answer at one port: started, looked after, and given other releases as a
whole.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.environment import LABELS, LABELS_FILE
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.metrics import SHARED
from radapter_serve.gateway.settings import TIMEOUTS, Settings
from radapter_serve.gateway.worker import Begin
from radapter_serve.release.served import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.engine_server import Plan, Ready, first_releases, ignore
from radapter_serve.server.processes import (
    STOPPED,
    Process,
    disk_errors,
    ending_with_parent,
    how_it_ended,
    server_folder,
)
from radapter_serve.server.releases import ReleaseChanges, Say
from radapter_serve.server.runtime_choice import Measured
from radapter_serve.server.watch import Failure
from radapter_serve.signals import STOPPING, handled
from radapter_serve.threads import environment

MAX_SILENCE_SECONDS = 30.0  # without a pulse, after which a worker counts as hanging
PREPARE_SECONDS = 600.0  # that one step of making a release ready may take
ANSWER_SECONDS = 10.0  # that any other answer of a worker may take
_HUNG = "it no longer answered, so it was killed"
# How a worker's last answer is called once there is none.
_GONE = "gone"


class WorkerGone(RAdapterError):
    """A worker that has ended, or was killed because it did not answer."""


class _Member:
    """One worker, seen from the group: started as often as it dies.

    Args:
        name: as messages call it.
        begin: what it is started with.
        listener: where it answers.
        folder: where workers keep their counters.
        changed: called where its health is another, in any thread.
        clock: tells the time.

    Attributes:
        ready: what it has made ready to be served, or serves.
        is_listening: whether it was told to answer callers.
        trouble: why not all its tasks answer; None where they do.
    """

    def __init__(
        self,
        name: str,
        begin: Begin,
        listener: socket.socket,
        folder: Path,
        changed: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.name = name
        self.ready: Plan | None = None
        self.is_listening = False
        self.trouble: str | None = f"{name} is starting"
        self._begin = begin
        self._listener = listener
        self._folder = folder
        self._changed = changed
        self._clock = clock
        self._asking = threading.Lock()
        self._sending = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The number of its process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start its process, which loads nothing yet; `begun` waits for it."""
        with self._asking:  # who asked the one before has heard of its end
            self._start()

    def begun(self) -> None:
        """Wait until it can be asked.

        Raises:
            RAdapterError: it can't start.
        """
        with self._asking:
            self._await(ignore, PREPARE_SECONDS)

    def _start(self) -> None:
        self.end()
        self._replies: queue.Queue[tuple[str, Any]] = queue.Queue()
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own: Ctrl-C reaches this process only, which then stops the
            # workers in order.
            handles = (theirs.fileno(), self._listener.fileno())
            command = [sys.executable, "-m", "radapter_serve.gateway.worker", *map(str, handles)]
            self._process = subprocess.Popen(
                ending_with_parent(command),
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                start_new_session=True,
                env={
                    **os.environ,
                    **environment(self._begin.config.encoder_threads),
                    SHARED: str(self._folder),
                    LABELS: str(self._folder.parent / LABELS_FILE),
                },
            )
        self._connection = Connection(ours.detach())
        self._last_pulse = self._clock.monotonic()
        with contextlib.suppress(OSError):  # which `ask` tells
            self._connection.send(self._begin)
        threading.Thread(
            target=self._hear, args=(self._connection, self._replies), name=self.name, daemon=True
        ).start()

    def ask(
        self, what: str, *arguments: Any, say: Say = ignore, seconds: float = ANSWER_SECONDS
    ) -> Any:
        """Let it do something; where it does not answer, it is killed.

        Args:
            what: its name.
            arguments: of it.
            say: called with a short line before each step.
            seconds: that a step may take.

        Raises:
            WorkerGone: it has ended.
            RAdapterError: it can't.
        """
        with self._asking:
            self.tell(what, *arguments)
            return self._await(say, seconds)

    def tell(self, *what: Any) -> None:
        """Say something that needs no answer."""
        with self._sending, contextlib.suppress(OSError):  # which `_hear` sees
            self._connection.send(what)

    def died(self) -> str | None:
        """Why it no longer works; None while it does. What a signal has stopped, or hangs, is
        killed.
        """
        if self._process is None:
            return "it was not started"
        if (code := self._process.poll()) is not None:
            return how_it_ended(code)
        with contextlib.suppress(OSError):
            if Process.of(self._process.pid).state == "T":
                self.end()
                return STOPPED
        silent = self._clock.monotonic() - self._last_pulse
        if self.is_listening and silent > MAX_SILENCE_SECONDS:
            self.end()
            return _HUNG
        return None

    def end(self) -> int | None:
        """Kill it, whatever state it is in; how it ended."""
        self.is_listening = False
        self.ready = None
        if self._process is None:
            return None
        self._process.kill()
        code = self._process.wait()
        mark_process_dead(self._process.pid, str(self._folder))  # type: ignore[no-untyped-call]
        return code

    def wait(self, seconds: float) -> None:
        """Wait until it has stopped, and kill it where it does not."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            self.end()

    def _await(self, say: Say, seconds: float) -> Any:
        while True:
            try:
                kind, value = self._replies.get(timeout=seconds)
            except queue.Empty:
                self.end()
                raise WorkerGone(f"{self.name} did not answer, so it was killed") from None
            if kind == "say":
                say(value)
            elif kind == "done":
                return value
            elif kind == "error":
                raise RAdapterError(value)
            else:
                self._replies.put((_GONE, None))  # for whoever asks next
                code = self.end()
                raise WorkerGone(f"{self.name} died: {how_it_ended(code or 0)}")

    def _hear(self, connection: Connection, replies: queue.Queue[tuple[str, Any]]) -> None:
        """Take what a process of it says, until it ends."""
        while True:
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                break
            if kind != "pulse":
                replies.put((kind, value))
                continue
            self._last_pulse = self._clock.monotonic()
            self._note(value and f"{self.name}: {value}")
        connection.close()
        if replies is self._replies:  # else another has been started
            self.is_listening = False
        replies.put((_GONE, None))
        self._note(f"{self.name} is starting again")

    def _note(self, trouble: str | None) -> None:
        before = self.trouble
        self.trouble = trouble
        if trouble != before:
            self._changed()


class WorkerGroup(ReleaseChanges):
    """Workers that answer as one server, as a context manager; a `Supervisor` keeps them up.

    They share a listener: whichever is free takes the next connection, and what none has taken yet
    outlives each of them. Their releases are changed in two steps: all make the new ones ready, and
    then all let new requests wait until each has them. So nobody gets an answer of the old ones
    after one of the new.

    Args:
        config: what to serve, and how; its threads are shared out.
        settings: of each worker's gateway; the memory for bodies is shared out.
        listener: of `listen`; the caller closes it before `stop`.
        count: of the workers.
        clock: tells the time.

    Attributes:
        folder: of this server, where `radapter-release` finds it.
        measured: what was found by `--runtime auto`.
    """

    folder: Path

    def __init__(
        self,
        config: ServerConfig,
        settings: Settings,
        listener: socket.socket,
        count: int,
        clock: Clock = SYSTEM,
    ) -> None:
        super().__init__(config)
        self.measured: Sequence[Measured] = ()
        self._count = count
        self._settings = settings
        self._listener = listener
        self._clock = clock
        self._members: dict[str, _Member] = {}
        # Held while the releases change places, and while a worker joins.
        self._changing = threading.RLock()
        self._telling = threading.Lock()
        self._present = Plan(Served(()), {}, config.runtime)
        self._stack = contextlib.ExitStack()

    def start(self, progress: Say = ignore) -> WorkerGroup:
        """Start the workers, load the releases in each, and let them answer.

        Args:
            progress: called with a short line before each step that takes long.

        Raises:
            RAdapterError: no release, one that is not as it was exported or does not answer, keys
                or a certificate that cannot be read.
        """
        served, kept = first_releases(self.config, progress)
        self._present = Plan(served, kept, self.config.runtime)
        self.folder = self._stack.enter_context(server_folder())
        counters = self.folder / "counters"
        with disk_errors():
            counters.mkdir()
        threads = max(1, self.config.encoder_threads // self._count)
        share = max(self._settings.max_body, self._settings.max_memory / self._count)
        begin = Begin(
            replace(self.config, threads=threads), replace(self._settings, max_memory=share)
        )
        for number in range(1, self._count + 1):
            name = f"worker {number}"
            self._members[name] = _Member(
                name, begin, self._listener, counters, self._tell_all, self._clock
            )
        self._stack.callback(self._end)
        progress("starting the workers")
        for member in self._members.values():
            member.start()
        for member in self._members.values():
            member.begun()
            self._make_ready(member, progress)
            member.ask("commit")
        for member in self._members.values():
            self._join(member)
        return self

    def stop(self) -> None:
        """Let running requests end, and then the workers."""
        # What stops already must not be cut short by a second Ctrl-C.
        with handled(signal.SIG_IGN, signal.SIGINT, *STOPPING):
            for member in self._members.values():
                if member.is_listening:
                    member.tell("stop")
            for member in self._members.values():
                if member.is_listening:
                    member.wait(TIMEOUTS.drain + 5)
            self._stack.close()

    @property
    def served(self) -> Served:
        return self._present.served

    @property
    def kept(self) -> Mapping[int, list[str]]:
        return self._present.kept

    # What a supervisor asks

    @property
    def models(self) -> Collection[str]:
        """The workers' names."""
        return self._members

    def failures(self) -> list[Failure]:
        """The workers that have died since they were last started."""
        found = []
        for member in self._members.values():
            if (why := member.died()) is not None:
                member.end()
                found.append(Failure(member.name, why))
        return found

    def kill(self, name: str) -> None:
        """End a worker."""
        self._members[name].end()

    def reload(self, model: str) -> None:
        """Start a worker again, and let it answer.

        Raises:
            RAdapterError: it can't load what is served.
        """
        member = self._members[model]
        member.start()
        member.begun()
        self._make_ready(member, ignore)
        with self._changing:
            if member.ready != self._present:
                self._make_ready(member, ignore)
            member.ask("commit")
            self._join(member)

    def restart(self) -> None:
        """Start all workers again."""
        for name in self._members:
            self.reload(name)

    # Releases

    def _let_go(self, kept: dict[int, list[str]]) -> None:
        if set(kept) < set(self.kept):
            self._take_over(self.served, kept, ignore)

    def _take_over(self, wanted: Served, kept: dict[int, list[str]], say: Say) -> None:
        plan = replace(self._present, served=wanted, kept=kept, checked=False)
        members = [one for one in self._members.values() if one.is_listening]
        if not members:
            raise RAdapterError("all workers are starting again; try again in a moment")
        try:
            for member in members:
                plan = self._prepare(member, plan, say)
            with self._changing:
                for member in self._members.values():
                    # Some may have come back meanwhile, with the releases of before.
                    if member.is_listening and member.ready != plan:
                        plan = self._prepare(member, plan, say)
                self._change_places(plan)
        except RAdapterError:
            for member in members:
                if member.is_listening:
                    with contextlib.suppress(RAdapterError):
                        member.ask("forget")
                    member.ready = self._present
            raise

    def _change_places(self, plan: Plan) -> None:
        """From here on there is no way back: a worker that fails is killed, and comes back with
        what all the others serve.
        """
        holding = []
        for member in self._members.values():
            if member.is_listening:
                with contextlib.suppress(RAdapterError):
                    member.ask("hold")
                    holding.append(member)
        self._present = plan
        for member in holding:
            try:
                member.ask("commit")
            except RAdapterError:
                member.end()

    def _make_ready(self, member: _Member, say: Say) -> None:
        """Let a worker load what is served."""
        self._present = self._prepare(member, self._present, say)

    def _prepare(self, member: _Member, plan: Plan, say: Say) -> Plan:
        """Let a worker load what a plan says; the plan as it is for the next, which need not check
        it again.
        """
        ready: Ready = member.ask(
            "prepare",
            plan,
            say=lambda line: say(f"{member.name}: {line}"),
            seconds=PREPARE_SECONDS,
        )
        self.measured = ready.measured or self.measured
        plan = replace(plan, runtime=ready.runtime, checked=True)
        member.ready = plan
        return plan

    def _join(self, member: _Member) -> None:
        member.ask("listen")
        member.is_listening = True
        self._tell_all()

    # Health: all are ready, or none is

    def _tell_all(self) -> None:
        """Tell each worker how the others are."""
        with self._telling:
            for member in self._members.values():
                if member.is_listening:
                    others = (one.trouble for one in self._members.values() if one is not member)
                    member.tell("others", next(filter(None, others), None))

    def _end(self) -> None:
        for member in self._members.values():
            member.end()

    def __enter__(self) -> WorkerGroup:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class NoProbe:
    """Finds nothing: a worker's pulse is part of its `failures`."""

    def step(self, models: Collection[str]) -> list[str]:
        return []

    def forget(self) -> None:
        pass
