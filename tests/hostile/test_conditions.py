"""Conditions that take long, of many callers at once, beside another caller of an engine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import urllib3
from pyarrow import parquet

from radapter_client import Client, RAdapterClientError
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build_from_embeddings
from radapter_serve.server.config import free_ports
from tests.helpers.fake_upstream import until

pytestmark = pytest.mark.slow
ROWS = 300_000
CALLERS = 64
PART = "upper(note) LIKE '%{}%'"
TIMEOUT = 20


@pytest.fixture
def indexes(releases: Path, tmp_path: Path) -> Path:
    """An index of many rows with a text column of 200 letters."""
    random = np.random.default_rng(0)
    loaded = load_release(releases, 2)
    vectors = random.normal(size=(ROWS, loaded.release.embed_dim)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    letters = random.integers(97, 123, (ROWS, 200), dtype=np.uint8).tobytes().decode()
    notes = [letters[start : start + 200] for start in range(0, len(letters), 200)]
    table = pa.table({"image": [f"{row}.jpg" for row in range(ROWS)], "note": notes})
    parquet.write_table(table, tmp_path / "rows.parquet")
    out = tmp_path / "indexes" / "photos"
    build_from_embeddings(tmp_path / "vectors.npy", tmp_path / "rows.parquet", out, loaded)
    return out.parent


@pytest.mark.parametrize("parts", [60, 6], ids=["refused", "allowed"])
def test_another_key_is_answered_and_the_process_ends(
    releases: Path, indexes: Path, tmp_path: Path, parts: int
) -> None:
    keys = tmp_path / "keys"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("many", "other")}
    keys.write_text("".join(f"{name}: {digest}\n" for name, digest in digests.items()))
    port = free_ports()[0]
    arguments = [releases, indexes, keys, port, TIMEOUT]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.helpers.engine_process", *map(str, arguments)]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    process = psutil.Process(server.pid)
    try:
        with Client(url, api_key="other", retries=0) as other:
            until(other.is_ready, 60)
            assert len(other.search("a", index="photos")) == 10
            before = process.memory_info().rss

            def search(number: int) -> str:
                where = " OR ".join(PART.format(f"{number}X{part}") for part in range(parts))
                try:
                    with Client(url, api_key="many", retries=0, timeout=2 * TIMEOUT) as client:
                        client.search("a", index="photos", where=where[:2000])
                except RAdapterClientError as error:
                    return f"{error.code}"
                return "answered"

            waits: list[float] = []
            most = before
            with ThreadPoolExecutor(CALLERS) as callers:
                searches = [callers.submit(search, number) for number in range(CALLERS)]
                while not all(call.done() for call in searches):
                    start = time.monotonic()
                    other.embed_texts([f"text {len(waits)}"], timeout=TIMEOUT)
                    ready = urllib3.request("GET", f"{url}/health/ready", timeout=TIMEOUT)
                    waits.append(time.monotonic() - start)
                    assert ready.status == 200
                    most = max(most, process.memory_info().rss)
                    time.sleep(0.05)
                outcomes = {call.result() for call in searches}

                # End it in the middle of others.
                searches = [callers.submit(search, CALLERS + number) for number in range(CALLERS)]
                time.sleep(1)
                start = time.monotonic()
                server.terminate()
                server.wait(2 * TIMEOUT)
                ended = time.monotonic() - start
        print(
            f"\n{parts} parts: {outcomes}; another key waits {np.median(waits):.2f} s, at most"
            f" {max(waits):.2f}; memory {before >> 20} to {most >> 20} MiB; ended in {ended:.1f} s"
        )
        assert outcomes <= {"answered", "invalid_argument", "overloaded", "timed_out"}
        assert most - before < 512 * 2**20
    finally:
        server.kill()
