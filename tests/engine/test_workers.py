"""`radapter-serve --engine process --workers N`: several processes that answer as one server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from radapter_client import Client
from radapter_serve.cli.serve import main as serve
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.group import NoProbe, WorkerGroup
from radapter_serve.gateway.run import listen
from radapter_serve.gateway.settings import Settings
from radapter_serve.release.served import Served
from radapter_serve.server.admin_socket import find_server
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.supervisor import Supervisor
from tests.helpers.indexes import outdated_at, write_facts
from tests.helpers.small_release import png, seal

WAIT = 90.0  # seconds, in which a test that works has long ended


def until(found: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@dataclass
class Group:
    """Two workers in processes of their own, and what looks after them."""

    url: str
    workers: WorkerGroup
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._supervisor = Supervisor(self.workers, self.said.append, probe=NoProbe())

    @property
    def pids(self) -> dict[str, int]:
        return {name: one.pid or 0 for name, one in self.workers._members.items()}

    def trouble(self) -> str:
        """Why it is not ready; nothing where it is."""
        try:
            urllib.request.urlopen(f"{self.url}/health/ready", timeout=10).close()
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return ""

    def until_back(self, name: str) -> None:
        """Look after the workers until one is back and all are ready."""
        self.said.clear()

        def is_back() -> bool:
            self._supervisor.step()
            return any(line.startswith(f"{name} is back") for line in self.said)

        until(is_back)
        until(lambda: not self.trouble())


@pytest.fixture(scope="module")
def group(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    folder = tmp_path_factory.mktemp("workers")
    copy = shutil.copytree(repository, folder / "models")
    Served((2,)).save(copy)
    port = free_ports()[0]
    config = ServerConfig(copy, Endpoints("127.0.0.1", port), indexes=folder / "indexes", threads=2)
    settings = Settings(port=port, max_memory=100.0)
    with listen(settings) as listener, WorkerGroup(config, settings, listener, 2) as workers:
        one = Group(f"http://127.0.0.1:{port}", workers)
        until(lambda: not one.trouble())
        yield one
        listener.close()


def test_workers_keep_the_embeddings_of_labels_in_one_file(group: Group) -> None:
    names = ["kept", "by all workers"]
    with Client(group.url, timeout=WAIT) as client:
        client.classify(png(0), names)
    with contextlib.closing(sqlite3.connect(group.workers.folder / "labels.sqlite")) as file:
        [[count]] = file.execute("SELECT COUNT(*) FROM labels")
    assert count >= len(names)


@contextlib.contextmanager
def asked(group: Group, retries: int) -> Iterator[tuple[list[tuple[float, float, int]], list[str]]]:
    """Callers who ask, each time over a connection of its own: when, and which release answered."""
    stop = threading.Event()
    seen: list[tuple[float, float, int]] = []
    failed: list[str] = []

    def ask() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            try:
                with Client(group.url, retries=retries, timeout=WAIT) as client:
                    release = client.classify(png(0), ["a", "b"]).release
            except Exception as error:
                failed.append(repr(error))
            else:
                seen.append((begun, time.monotonic(), release))

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(ask)
        try:
            until(lambda: len(seen) > 20)
            yield seen, failed
            before = len(seen)
            until(lambda: len(seen) > before + 20)
        finally:
            stop.set()


def test_both_answer_and_are_counted_together(group: Group) -> None:
    before = counted(group)
    with asked(group, 0) as (seen, failed):
        until(lambda: len(seen) > 60)
    assert not failed
    assert counted(group) - before == len(seen)
    used = [ticks(pid) for pid in group.pids.values()]
    assert min(used) > 0
    parts = [path.name for path in (group.workers.folder / "counters").glob("counter_*")]
    assert len(parts) == 2


def test_any_of_them_says_which_index_is_of_another_release(group: Group) -> None:
    photos = group.workers.config.indexes / "photos"
    write_facts(photos, "sha256:another")
    assert [outdated_at(f"{group.url}/metrics") for _ in range(4)] == [{"photos": 1}] * 4
    shutil.rmtree(photos)
    assert outdated_at(f"{group.url}/metrics") == {}


def counted(group: Group) -> float:
    with urllib.request.urlopen(f"{group.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    wanted = 'radapter_gateway_requests_total{code="ok",task="classify"} '
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    assert len(lines) <= 1
    return sum(float(line.removeprefix(wanted)) for line in lines)


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11])


def test_what_they_share_out(group: Group) -> None:
    begin = group.workers._members["worker 1"]._begin
    assert begin.config.encoder_threads == 1
    assert begin.settings.max_memory == max(50.0, begin.settings.max_body)


def test_a_switch_fails_nobody_and_nobody_gets_the_old_after_the_new(group: Group) -> None:
    for number in (1, 2):
        with asked(group, 0) as (seen, failed):
            said: list[str] = []
            assert group.workers.load([number], said.append) == f"release {number} is served"
        # One compares with torch's embeddings, for all.
        compared = [line.partition(":")[0] for line in said if "comparing image_encoder" in line]
        assert compared == (["worker 1"] if number == 1 else compared)
        assert not failed
        assert {release for _, _, release in seen} == {1, 2}
        first = min(ended for _, ended, release in seen if release == number)
        assert not [begun for begun, _, release in seen if begun > first and release != number]


def test_a_killed_worker_is_started_again_and_nobody_who_asks_again_fails(group: Group) -> None:
    before = group.pids
    counts = counted(group)
    with asked(group, 2) as (seen, failed):
        os.kill(before["worker 1"], signal.SIGKILL)
        until(lambda: "worker 1 is starting again" in group.trouble())
        group.until_back("worker 1")
    assert not failed
    assert group.said[0].startswith("the process of worker 1 died: it was killed by SIGKILL")
    assert group.pids["worker 1"] != before["worker 1"]
    assert group.pids["worker 2"] == before["worker 2"]
    assert counted(group) >= counts + len(seen)


@pytest.mark.slow
def test_a_frozen_worker_is_replaced(group: Group) -> None:
    os.kill(group.pids["worker 2"], signal.SIGSTOP)
    group.until_back("worker 2")
    assert "a signal had stopped it" in group.said[0]


@pytest.mark.slow
def test_a_worker_that_dies_in_the_middle_of_a_switch_fails_it(group: Group) -> None:
    [now] = group.workers.served.releases
    other = 3 - now

    def kill(line: str) -> None:
        if line.startswith("worker 2: loading"):
            os.kill(group.pids["worker 2"], signal.SIGKILL)

    with pytest.raises(RAdapterError, match=f"release {now} is served as before: worker 2 died"):
        group.workers.load([other], kill)
    group.until_back("worker 2")
    with asked(group, 0) as (seen, failed):
        pass
    assert not failed and {release for _, _, release in seen} == {now}


@pytest.mark.slow
def test_a_worker_that_comes_back_after_a_switch_has_what_the_others_serve(group: Group) -> None:
    [now] = group.workers.served.releases
    other = 3 - now
    os.kill(group.pids["worker 2"], signal.SIGKILL)
    until(lambda: "worker 2" in group.trouble())
    assert group.workers._members["worker 2"].died()
    assert group.workers.load([other], lambda line: None) == f"release {other} is served"
    group.until_back("worker 2")
    with asked(group, 0) as (seen, failed):
        pass
    assert not failed and {release for _, _, release in seen} == {other}


def test_a_broken_release_leaves_the_old_one_with_all(group: Group) -> None:
    [now] = group.workers.served.releases
    other = 3 - now
    path = group.workers.config.model_repository / "text_encoder" / str(other) / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(b"broken")
    try:
        with pytest.raises(RAdapterError, match="text_encoder"):
            group.workers.load([other], lambda line: None)
        seal(group.workers.config.model_repository, other)
        with pytest.raises(RAdapterError, match="cannot load"):
            group.workers.load([other], lambda line: None)
    finally:
        path.write_bytes(whole)
        seal(group.workers.config.model_repository, other)
    with asked(group, 0) as (seen, failed):
        pass
    assert not failed and {release for _, _, release in seen} == {now}


def test_a_port_with_broken_keys_starts_nothing(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("no key")
    settings = Settings(port=0, api_keys=tmp_path / "keys")
    config = ServerConfig(repository, indexes=tmp_path)
    with listen(settings) as listener:
        workers = WorkerGroup(config, settings, listener, 2)
        try:
            with pytest.raises(RAdapterError, match="keys, line 1: each line is"):
                workers.start()
        finally:
            workers.stop()
        assert not workers.folder.exists()
        assert all(one.died() for one in workers._members.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers is 0; allowed are 1 and more"),
        (["--workers", "2", "--engine", "triton"], "say --instances 2, or --engine process"),
    ],
)
def test_flags_that_can_not_be(
    repository: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert serve([str(repository), "--engine", "process", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_command(repository: Path, tmp_path: Path, number: int) -> None:
    port = free_ports()[0]
    command = [sys.executable, "-m", "radapter_serve.cli.serve", str(repository)]
    command += ["--engine", "process", "--workers", "2", "--http-port", str(port)]
    process = subprocess.Popen(
        [*command, "--indexes", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until(lambda: find_server(repository, None) is not None or process.poll() is not None)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
    finally:
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT)
    assert b"Traceback" not in err, err.decode()
    until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()])
    if number == signal.SIGTERM:
        assert process.returncode == 0
        assert f"HTTP     http://127.0.0.1:{port}".encode() in out
