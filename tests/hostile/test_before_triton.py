"""A gateway before a real tritonserver: what takes it long, or much memory, costs other callers no
answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import urllib3
from PIL import Image
from pyarrow import parquet

from radapter_client import Client, InvalidRequest, RAdapterClientError, Request
from radapter_serve.adapter import save_adapter
from radapter_serve.cli.release import main as command
from radapter_serve.clip.base import load_base
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.gateway.settings import Settings
from radapter_serve.index.build import build_from_embeddings
from radapter_serve.release.integrity import write_sums
from radapter_serve.server.config import free_ports
from tests.conftest import export_into
from tests.helpers.asking import meanwhile, tritonserver
from tests.helpers.fake_upstream import packed, until
from tests.helpers.gateway import start
from tests.helpers.small_release import png
from tests.helpers.text_adapters import text_adapter
from tests.hostile.test_hostile import memory

pytestmark = pytest.mark.triton
ROWS = 20_000
LETTERS = 1_000  # of each row's note
PARTS = 6  # of a condition, each of which reads all notes
CALLERS = 40
TIMEOUT = 30  # seconds of a request
MEMORY = 32  # MiB of the gateway for bodies and answers
MORE = 48  # MiB that the gateway may hold beyond that
# MiB in all, with copies: measured were 46, and 249 where no answer holds the memory set apart.
MOST = 148
CATS = ["cat", "dog"]


@dataclass(frozen=True)
class Front:
    """A gateway, the repository that the Triton behind it serves, and clients with two keys."""

    url: str
    pid: int
    repository: Path
    other: Client

    def many(self, retries: int = 0) -> Client:
        return Client(self.url, api_key="many", retries=retries, timeout=TIMEOUT + 5)

    def metric(self, name: str) -> float:
        headers = {"Authorization": "Bearer other"}
        text = urllib3.request("GET", f"{self.url}/metrics", headers=headers).data.decode()
        [value] = re.findall(rf"^radapter_gateway_{name} (\S+)", text, re.MULTILINE)
        return float(value)


@pytest.fixture(scope="module")
def repository(tiny_clip_dir: str, common: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with an adapter `anna` and a label set `many`, whose prompts it has not stored."""
    folder = tmp_path_factory.mktemp("before")
    save_adapter(text_adapter(load_base(tiny_clip_dir), 0), folder / "adapter.safetensors")
    (folder / "many.txt").write_text("".join(f"thing {number}\n" for number in range(4000)))
    sets = {"many": folder / "many.txt"}
    export_into(
        folder, common, folder / "adapter.safetensors", [0.0], label_sets=sets, dense="naclip"
    )
    repository = folder / "model_repository"
    (repository / "text_encoder" / "1" / "many.prompts.npy").unlink()
    write_sums(repository, 1)
    where = ["--model-repository", str(repository)]
    assert command(["add-adapter", "anna", str(folder / "adapter.safetensors"), *where]) == 0
    return repository


@pytest.fixture(scope="module")
def front(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("served")
    # An index of which each part of a condition reads 20 MB
    random = np.random.default_rng(0)
    loaded = load_release(repository)
    vectors = random.normal(size=(ROWS, loaded.release.embed_dim)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    letters = random.integers(97, 123, (ROWS, LETTERS), dtype=np.uint8)
    table = {"image": [f"{row}.jpg" for row in range(ROWS)]}
    table["note"] = [row.tobytes().decode() for row in letters]
    parquet.write_table(pa.table(table), folder / "rows.parquet")
    indexes = folder / "indexes"
    files = folder / "vectors.npy", folder / "rows.parquet"
    build_from_embeddings(*files, indexes / "notes", loaded)

    keys = folder / "keys"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("many", "other")}
    keys.write_text("".join(f"{name}: {digest}\n" for name, digest in digests.items()))
    with (
        contextlib.ExitStack() as stack,
        tritonserver(repository, indexes=indexes, instances=["2"]) as server,
    ):
        settings = Settings(
            port=free_ports()[0],
            server=server.grpc_url.removeprefix("grpc://"),
            api_keys=keys,
            max_body=1,
            max_memory=MEMORY,
            timeout=TIMEOUT,
        )
        process = start(settings)
        stack.callback(process.wait, 60)
        stack.callback(process.terminate)
        url = f"http://127.0.0.1:{settings.port}"
        other = stack.enter_context(Client(url, api_key="other", retries=0, timeout=TIMEOUT + 5))

        def is_ready() -> bool:
            with contextlib.suppress(RAdapterClientError):
                return other.is_ready()
            return False

        until(is_ready, 60)
        yield Front(url, process.pid, repository, other)


@contextlib.contextmanager
def answered(front: Front) -> Iterator[None]:
    """Check that another key has the same answers in the block as before."""

    def answers() -> list[Any]:
        [top] = front.other.classify([png(1)], CATS)
        return [front.other.embed_texts(["a cat"]).tolist(), top]

    before = answers()

    def ask() -> None:
        assert answers() == before
        assert urllib3.request("GET", f"{front.url}/health/ready", timeout=TIMEOUT).status == 200

    with meanwhile(ask):
        yield


def outcome_of(client: Client, method: str, *arguments: Any, **options: Any) -> str:
    try:
        getattr(client, method)(*arguments, **options)
    except RAdapterClientError as error:
        return f"{error.code}"
    return "answered"


def test_conditions_of_many_callers_leave_room_for_other_searches(front: Front) -> None:
    outcomes: Counter[str] = Counter()

    def search(number: int, parts: int) -> str:
        words = [f"upper(note) LIKE '%{number}X{part}%'" for part in range(parts)]
        with front.many() as client:
            return outcome_of(client, "search", "a", index="notes", where=" OR ".join(words))

    def count(number: int) -> None:
        outcomes[search(number, PARTS)] += 1

    assert search(0, 60) == "invalid_argument"
    expected = front.other.search("a", index="notes")
    before = memory(front.pid)
    with ThreadPoolExecutor(CALLERS) as callers, answered(front):
        calls = [callers.submit(count, number) for number in range(CALLERS)]
        until(lambda: front.metric("running") + outcomes.total() >= CALLERS - 1, TIMEOUT)
        earlier = outcomes["answered"]
        assert front.other.search("a", index="notes") == expected
        # It waits for those that run, and not for those that wait.
        assert outcomes["answered"] - earlier < 8
        for call in calls:
            call.result()
    assert set(outcomes) <= {"answered", "overloaded", "timed_out"}
    assert outcomes["answered"] and outcomes["overloaded"]
    assert memory(front.pid) - before < MORE


def test_slow_readers_of_large_masks_take_the_memory_that_is_set_apart(front: Front) -> None:
    """Each answer has 18 MB, and half the gateway's memory."""
    large = flat_image(3000)
    mask = front.many(20).segment(large, CATS).mask
    before = memory(front.pid)
    most = before

    def look() -> None:
        nonlocal most
        most = max(most, memory(front.pid))

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(10) as threads:
        stack.enter_context(answered(front))
        stack.enter_context(meanwhile(look))
        port = int(front.url.rpartition(":")[2])
        readers = []
        for _ in range(10):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            reader.settimeout(2 * TIMEOUT)
            reader.connect(("127.0.0.1", port))
            reader.sendall(segment_request(large))
            readers.append(reader)
        statuses = Counter(threads.map(lambda reader: reader.recv(12)[9:], readers))
        assert set(statuses) == {b"200", b"429"}
        assert memory(front.pid) - before < MEMORY + MORE
        # They give way to who reads.
        with front.many(20) as patient:
            assert np.array_equal(patient.segment(large, CATS).mask, mask)
        until(lambda: front.metric("body_bytes") == 0)
        assert memory(front.pid) - before < MORE
    print(f"\nmemory of the gateway {before} to {most} MiB; {statuses}")
    assert most - before < MOST


def flat_image(side: int) -> bytes:
    """A small PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def segment_request(image: bytes) -> bytes:
    """A request of the key `many` for a mask in binary."""
    data = [packed([image]), packed(name.encode() for name in CATS)]
    inputs = [
        {
            **{"name": name, "datatype": "BYTES", "shape": [count]},
            "parameters": {"binary_data_size": len(part)},
        }
        for name, count, part in zip(("image", "labels"), (1, len(CATS)), data, strict=True)
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = b"".join([head, *data])
    return (
        b"POST /v2/models/segment/infer HTTP/1.1\r\nHost: localhost\r\n"
        b"Authorization: Bearer many\r\nContent-Type: application/octet-stream\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n%s"
    ) % (len(head), len(body), body)


def test_one_label_set_is_encoded_at_a_time_in_all_processes(front: Front) -> None:
    point: dict[str, Any] = {"adapter": "anna", "label_set": "many"}

    def ask(method: str, number: int) -> str:
        with front.many() as client:
            return outcome_of(client, method, png(0), **point, alpha=0.1 * number)

    jobs = [(method, number) for number in (2, 3, 4) for method in ("classify", "segment")]
    with answered(front), ThreadPoolExecutor(len(jobs)) as callers:
        outcomes = Counter(callers.map(lambda job: ask(*job), jobs))
    assert set(outcomes) == {"answered", "overloaded"}
    with Client(transport=Engine([load_release(front.repository)])) as local:
        expected = local.classify(png(0), **point, alpha=0.3)
    with front.many(20) as client:
        answer = client.classify(png(0), **point, alpha=0.3)
    assert answer.labels == expected.labels
    np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-6)


def test_a_request_with_examples_and_one_refused_adapter_is_refused_as_a_whole(
    front: Front,
) -> None:
    images = [png(number) for number in range(4)]
    shown = [png(number) for number in (10, 11)]

    def ask(adapters: list[str]) -> Any:
        inputs: dict[str, Any] = {
            "image": np.array([[image] for image in images], object),
            "labels": np.array([[name.encode() for name in CATS]] * 4, object),
            "examples": np.array([shown] * 4, object),
            "example_labels": np.array([[0, 1]] * 4, np.int32),
            "adapter": np.array([[name.encode()] for name in adapters], object),
        }
        with front.many() as client:
            request = Request("infer", "classify", inputs=inputs)
            return client._sender._transport.send(request, TIMEOUT).outputs

    def refused(adapters: list[str]) -> str:
        with pytest.raises(InvalidRequest) as error:
            ask(adapters)
        assert error.value.code == "unknown_adapter" and "\n" not in str(error.value)
        return str(error.value)

    good = ["anna", "", "anna", ""]
    expected = ask(good)
    with answered(front), ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(ask, good) for _ in range(20)]
        wrong = [callers.submit(refused, ["anna", "", "nobody", "anna"]) for _ in range(20)]
        assert all("nobody" in call.result() for call in wrong)
        for call in calls:
            answer = call.result()
            assert list(answer) == list(expected)
            assert all(np.array_equal(answer[name], expected[name]) for name in expected)
