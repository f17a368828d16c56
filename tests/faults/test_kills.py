"""Commands that are killed at each of their steps on the disk: what is served, and what is left."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import numpy as np
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.adapters import (
    FOLDER,
    LIST,
    AdapterFacts,
    add,
    load,
    read_list,
    remove_adapter,
)
from radapter_serve.release.repository import Served
from radapter_serve.server.config import free_ports
from radapter_serve.server.releases import ask, find_server
from tests.helpers.fake_upstream import until
from tests.helpers.killed import killed_at

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="children are forked")
WIDTH = 6


def put(repository: Path, scale: float) -> None:
    facts = AdapterFacts(text_tower="sha256:" + "a" * 64, width=WIDTH, alpha=0.5)
    matrix = scale * np.eye(WIDTH, dtype=np.float32)
    add(repository, "anna", facts, (matrix,), replace=True)


def served(repository: Path) -> float | None:
    """The scale of the adapter that is served, or None."""
    entries = read_list(repository)
    if not entries:
        return None
    return float(load(repository, "anna", entries["anna"]).factors[0][0, 0])


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (partial(put, scale=2), None, 2),
        (partial(put, scale=2), 1, 2),
        (partial(put, scale=1), 1, 1),
        (partial(remove_adapter, name="anna"), 1, None),
    ],
    ids=["add", "replace", "replace-equal", "remove"],
)
def test_adapters_are_those_of_before_or_after(
    tmp_path: Path, change: partial[object], before: float | None, after: float | None
) -> None:
    """The next command removes what the killed one left."""
    repository = tmp_path / "models"
    seen: list[float | None] = []
    while True:
        shutil.rmtree(repository, ignore_errors=True)
        repository.mkdir()
        if before is not None:
            put(repository, before)
        if not killed_at(len(seen) + 1, repository, partial(change, repository)):
            break
        seen.append(served(repository))
        put(repository, 3)
        assert served(repository) == 3
        left = {path.name for path in (repository / FOLDER).iterdir()}
        assert left == {LIST, read_list(repository)["anna"].folder}
    assert served(repository) == after
    assert seen[0] == before and seen[-1] == after and set(seen) <= {before, after}
    assert len(seen) >= 6


# A server of which release 1 takes two seconds to load, which are spent in C++
SLOW = """
import sys
import time
import numpy as np
from radapter_serve.cli.serve import main
from radapter_serve.gateway import in_process

load = in_process.load_release

def load_slowly(*arguments, **options):
    loaded = load(*arguments, **options)
    end = time.monotonic() + 2
    while loaded.release.version == 1 and time.monotonic() < end:
        loaded.encoder.images(np.zeros((64, *loaded.preprocess.size, 3), np.uint8))
    return loaded

in_process.load_release = load_slowly
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_in_a_switch_serves_what_it_served(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """SIGTERM ends it in order, though another thread loads a model."""
    repository = shutil.copytree(releases, tmp_path / "models")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    flags = [str(repository), "--engine", "process", "--http-port", str(free_ports()[0])]
    with Popen(
        [sys.executable, "-c", SLOW, *flags],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    ) as server:
        until(lambda: find_server(repository) is not None, 60)
        folder = find_server(repository)
        assert folder is not None

        def end(line: str) -> None:
            if line == "choosing the precision":
                time.sleep(0.2)
                server.send_signal(number)

        with pytest.raises((RAdapterError, OSError), match="ended before|the server stops|reset"):
            ask(folder, {"do": "load", "releases": [1]}, end)
        out, _ = server.communicate(timeout=60)
    assert server.returncode == (0 if number == signal.SIGTERM else -number), out
    assert "terminate" not in out and "Traceback" not in out
    assert Served.load(repository).releases == (2,)
