"""Memory of the server's processes: at rest, after work, and while thousands of large requests come
at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc.aio
import psutil
import tyro
import urllib3
from common import CLASS_NAMES, RESULTS, Report, memory, say
from tritonclient.grpc import service_pb2

from radapter_client import Client
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.server.config import free_ports

sys.path.insert(0, str(Path(__file__).parents[1]))  # the requests are made as the tests make them

from tests.helpers.small_release import photos_in, png, write_release
from tests.hostile.asks import LABEL_SET, ask, pack
from tests.hostile.images import png_of

MIB = 2**20
GRPC = "gRPC"
HTTP = "HTTP"
GATEWAY = "gateway"
END = b"\r\n\r\n"  # of headers
WAIT = 300  # seconds for an answer, after which a request counts as a TimeoutError
PIECE = 2**17  # bytes that a caller hands over at once
GRPC_CALLERS = 100  # connections over gRPC; its messages take turns on one


@contextlib.contextmanager
def running(folder: Path) -> Iterator[tuple[list[int], dict[str, str]]]:
    """radapter-serve of a tiny release with an index, and radapter-gateway; the numbers of their
    processes, and a URL for each way in.
    """
    write_release(folder / "repository", 1, seed=1)
    indexes = folder / "indexes"
    build(photos_in(folder / "photos"), indexes / "photos", load_release(folder / "repository"))
    http, grpc, metrics = free_ports()
    gateway = free_ports()[0]
    serve = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    commands = [
        ["serve", str(folder / "repository"), *serve, "--indexes", str(indexes)],
        ["gateway", "--port", str(gateway), "--server", f"127.0.0.1:{grpc}"],
    ]
    with contextlib.ExitStack() as stack:
        processes = []
        for name, *arguments in commands:
            command = [sys.executable, "-m", f"radapter_serve.cli.{name}", *arguments]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        ways = {GRPC: f"grpc://127.0.0.1:{grpc}", HTTP: f"http://127.0.0.1:{http}"}
        ways[GATEWAY] = f"http://127.0.0.1:{gateway}"
        retries = urllib3.Retry(40, backoff_factor=1, backoff_max=5, status_forcelist=[503])
        urllib3.request("GET", f"{ways[GATEWAY]}/health/ready", retries=retries, timeout=10)
        yield [process.pid for process in processes], ways


def pids(parents: list[int]) -> dict[str, int]:
    """The numbers of all processes, by what people call them."""
    numbers = dict(zip(("radapter-serve", "radapter-gateway"), parents, strict=True))
    models: Counter[str] = Counter()
    for server in psutil.Process(parents[0]).children():
        numbers["tritonserver"] = server.pid
        for process in server.children():
            if model := re.search(r"/([^/]+)/\d+/model\.py$", process.cmdline()[1]):
                models[model[1]] += 1
                numbers[f"{model[1]}, process {models[model[1]]}"] = process.pid
    return numbers


def resident(pid: int, field: str = "VmRSS") -> float:
    """MiB of memory of a process, now or at its peak (`VmHWM`)."""
    return memory(field, pid) / MIB


def at_rest(parents: list[int]) -> dict[str, tuple[float, float]]:
    """MiB of each process: all of it, and what it shares with no other."""
    return {
        name: (resident(pid), psutil.Process(pid).memory_full_info().uss / MIB)
        for name, pid in pids(parents).items()
    }


def work(url: str) -> None:
    """Fill the processes: full batches, many labels, large images, searches; each often enough for
    two.
    """
    photo = png(1, 640, 480)
    wall = png(2, 4000, 3000, "JPEG")
    with Client(url, timeout=300) as client:
        for number in range(4):
            client.embed_images([photo] * 64)
            client.embed_texts([f"text {number} {row}" for row in range(64)])
            client.classify(wall, label_set=LABEL_SET)
            client.classify(photo, CLASS_NAMES)
            client.segment(wall, CLASS_NAMES[:20])
            client.search("a cat", index="photos")


class Flood:
    """Many requests of one kind at once, each on a connection of its own."""

    def __init__(self, model: str, inputs: Mapping[str, list[Any]], count: int) -> None:
        self.model = model
        self.inputs = inputs
        self.count = count
        self.results: Counter[str] = Counter()

    def over(self, url: str) -> Counter[str]:
        """Send them; how often each status came."""
        self.results.clear()
        asyncio.run(self._grpc(url) if url.startswith("grpc:") else self._http(url))
        return self.results

    async def _http(self, url: str) -> None:
        place = urlsplit(url)
        asked = ask(self.model, dict(self.inputs), binary=True)
        # Without keys the gateway takes no other name.
        message = memoryview(asked.raw(headers={"Host": place.netloc}))
        go = asyncio.Event()

        async def call() -> None:
            try:
                async with asyncio.timeout(WAIT):  # type: ignore[attr-defined]  # Python 3.11
                    await exchange()
            except asyncio.IncompleteReadError:
                self.results["closed"] += 1
            except OSError as error:
                self.results[type(error).__name__] += 1

        async def exchange() -> None:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            answer = asyncio.ensure_future(
                reader.readuntil(END)
            )  # a connection too many is told so at once
            await go.wait()
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(message), PIECE):
                    if answer.done():  # refused before it was sent
                        break
                    writer.write(message[start : start + PIECE])
                    await writer.drain()
            head = await answer
            length = re.search(rb"(?i)content-length: (\d+)", head)
            left = int(length[1]) if length else 0
            while left and (part := await reader.read(PIECE)):
                left -= len(part)
            self.results[head[9:12].decode()] += 1
            writer.close()

        async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined]
            for _ in range(self.count):
                group.create_task(call())
                await asyncio.sleep(0)
            await asyncio.sleep(1)
            go.set()

    async def _grpc(self, url: str) -> None:
        message = service_pb2.ModelInferRequest(model_name=self.model)
        for name, value in self.inputs.items():
            rows = [len(value)]
            message.inputs.add(
                name=name, datatype="BYTES", shape=[1, *rows] if self.model == "classify" else rows
            )
            message.raw_input_contents.append(pack(value))
        data = message.SerializeToString()
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with contextlib.AsyncExitStack() as stack:
            calls = []
            for _ in range(min(GRPC_CALLERS, self.count)):
                channel = await stack.enter_async_context(
                    grpc.aio.insecure_channel(urlsplit(url).netloc, options)
                )
                await channel.channel_ready()
                calls.append(channel.unary_unary("/inference.GRPCInferenceService/ModelInfer"))

            async def call(number: int) -> None:
                try:
                    await calls[number % len(calls)](data, timeout=WAIT)
                    self.results["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    self.results[error.code().name] += 1

            await asyncio.gather(*map(call, range(self.count)))


def main(
    count: int = 2_000,
    size: float = 2.0,
    callers: tuple[str, ...] = (GATEWAY, HTTP, GRPC),
    out: Path = RESULTS,
) -> None:
    """Measure memory, and write the table.

    Args:
        count: requests at once.
        size: MiB of the image in each.
        callers: ways in that are flooded, one after another.
        out: folder of the results.
    """
    report = Report(
        "memory",
        f"Memory: at rest, after work and under {count:,} large requests at once",
        "radapter-serve with every task, two processes each, and radapter-gateway, both with their"
        " defaults. The vocabulary is CLIP's; the encoders are tiny, so tritonserver has next to no"
        " weights.",
        timed=False,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("starting the server and the gateway")
        with running(folder) as (parents, ways):
            first = at_rest(parents)
            say("working")
            work(ways[GATEWAY])
            after = at_rest(parents)
            rows = [
                [
                    name,
                    *(
                        f"{value:.0f}"
                        for value in (*first[name], *after[name], resident(pid, "VmHWM"))
                    ),
                ]
                for name, pid in sorted(pids(parents).items())
            ]
            report.table(
                "MiB of each process",
                ["process", "start", "own", "after work", "own", "peak"],
                rows,
            )
            report.note(
                "Own: what the process shares with no other. Start: when every task has answered"
                " once."
            )
            masks = Flood("segment", {"image": [png_of(8000, 8000)], "labels": ["a"]}, count)
            large = Flood("classify", {"image": [noise(size)], "labels": CLASS_NAMES[:3]}, count)
            floods = [(way, large) for way in callers] + [(GATEWAY, masks)]
            rows = []
            for way, flood in floods:
                rows.append(flooded(parents, way, ways[way], flood))
                report.table(f"{count:,} requests at once", HEAD, rows)
                report.write(out)
    report.note(
        f"Classify: an image of {size:g} MiB. Segment: one of 8 kB with 8,000 x 8,000 pixels, so a"
        " mask of 122 MiB. MiB are each process's peak above what it had before; for the tasks,"
        " the sum over their processes. BrokenPipeError is a request that the gateway refused, and"
        " whose connection it closed, before the caller had sent all of it."
    )
    report.write(out)


HEAD = ["task, way", "results", "seconds", "gateway", "tritonserver", "tasks", "all"]


def noise(size: float) -> bytes:
    """A PNG of so many MiB that no compression makes smaller."""
    side = int((size * MIB / 3) ** 0.5)
    return png(3, side, side)


def flooded(parents: list[int], way: str, url: str, flood: Flood) -> list[str]:
    """One row: what came back, and how far the memory of the processes rose."""
    say(f"{flood.count:,} requests to {flood.model} over {way}")
    before = {}
    for name, pid in pids(parents).items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        before[name] = pid, resident(pid)
    start = time.monotonic()
    results = flood.over(url)
    seconds = time.monotonic() - start
    rise: Counter[str] = Counter()
    for name, (pid, mib) in before.items():
        rise[name if name in ("radapter-gateway", "tritonserver") else "tasks"] += round(
            resident(pid, "VmHWM") - mib
        )
    words = ", ".join(f"{name}: {number:,}" for name, number in sorted(results.items()))
    say(f"{words}; {dict(rise)} MiB")
    figures = [rise["radapter-gateway"], rise["tritonserver"], rise["tasks"], sum(rise.values())]
    return [f"{flood.model}, {way}", words, f"{seconds:.0f}", *map(str, figures)]


if __name__ == "__main__":
    tyro.cli(main)
