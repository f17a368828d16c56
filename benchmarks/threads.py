"""How many threads an encoder should have: images, texts, and both at once, asked of a real
tritonserver.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import tyro
from common import RESULTS, Process, Report, alternate, picture, ratio, say
from serving import export

from radapter_client import Client
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.processes import children
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.threads import cores

# Callers that ask for images and for texts at the same time, each one request after the other.
LOADS = {
    "1 image": (1, 0),
    "4 images": (4, 0),
    "1 text": (0, 1),
    "4 texts": (0, 4),
    "2 images, 2 texts": (2, 2),
}


class Load:
    """A number of images and of texts, asked for by so many callers; each run returns the seconds
    it took.

    Keeps the processor's seconds in all processes of the server, too: other work on the machine
    does not change them.
    """

    def __init__(
        self, callers: Sequence[int], calls: Sequence[Callable[[], object]], count: int, pid: int
    ) -> None:
        self._parts = [(some, call) for some, call in zip(callers, calls, strict=True) if some]
        self._count = count
        self._pid = pid
        self.processor: list[float] = []

    def __call__(self) -> float:
        before = processor_seconds(self._pid)
        start = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            for some, call in self._parts:
                for _ in range(some):
                    pool.submit(
                        lambda call=call, share=self._count // some: [call() for _ in range(share)]
                    )
        self.processor.append(processor_seconds(self._pid) - before)
        return time.perf_counter() - start


def processor_seconds(pid: int) -> float:
    """What a server and the processes of its models have used."""
    ticks = 0
    for one in (pid, *children(pid)):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main(
    architecture: str = "ViT-B-32", count: int = 12, repeats: int = 5, out: Path = RESULTS
) -> None:
    """Compare encoders that share the cores with encoders that each have them all.

    Args:
        architecture: open_clip architecture, with random weights and an adapter.
        count: requests of each kind in a load.
        repeats: rounds.
        out: folder of the table.
    """
    here = cores()
    candidates = {
        f"{own} thread{'s' if own > 1 else ''} each": own
        for own in sorted({here, max(1, here // 2)})
    }
    report = Report(
        "threads",
        f"Threads of an encoder: {architecture}",
        f"{count} embed_image of a JPEG of 224 x 224 pixels, {count} embed_text or both, over gRPC,"
        f" by 1 to 4 callers. image_encoder and text_encoder have one instance each, on {here}"
        " cores.",
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("exporting")
        with Process() as process:
            process.call(export, architecture, folder)
        jpeg = picture(224, 224)
        text = "a photo of a red bicycle leaning against a wall"
        loads: dict[str, dict[str, Load]] = {title: {} for title in LOADS}
        for name, own in candidates.items():
            say(f"starting a server with {name}")
            server = stack.enter_context(
                TritonServer(
                    ServerConfig(folder / "repository", Endpoints.on_free_ports(), threads=own)
                )
            )
            client = stack.enter_context(Client(server.grpc_url))
            calls = partial(client.embed_images, [jpeg]), partial(client.embed_texts, [text])
            for title, callers in LOADS.items():
                loads[title][name] = Load(callers, calls, count, server.pid)
        rows = []
        baseline = list(candidates)[-1]
        for title, own in loads.items():
            say(f"{title}: {repeats} rounds and a warm-up")
            times = alternate(own, repeats)
            for name, load in own.items():
                figures = times[name], load.processor[1:]
                compared = times[baseline], own[baseline].processor[1:]
                cells = [
                    cell
                    for found, other in zip(figures, compared, strict=True)
                    for cell in (
                        f"{1e3 * statistics.median(found) / count:.1f}",
                        f"{ratio(found, other):.2f}",
                    )
                ]
                rows.append([title, name, *cells])
    columns = ["load", "candidate", "ms", "ratio", "processor ms", "ratio"]
    report.table("A request, or one of each kind", columns, rows)
    report.note(
        f"Ratios: to {baseline}, which is what ONNX Runtime takes by itself. Other work on the"
        " machine makes ms longer, not processor ms."
    )
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
