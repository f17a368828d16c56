"""Served against in-process: `classify` of a JPEG by tritonserver, over gRPC and HTTP, and by the
same code here.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tyro
from common import (
    CLASS_NAMES,
    RESULTS,
    Process,
    Report,
    alternate,
    picture,
    random_clip,
    ratio,
    say,
)
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from radapter_client import Client
from radapter_serve.contract.alpha import Alpha
from radapter_serve.encoders.labels import load_label_sets
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import run_together
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Release
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.tasks.classify import ClassifyRequest, classify
from radapter_serve.tasks.labels import Labels

LABEL_SET = "names"
STAGES = (
    "decode, resize, score, hand-over",
    "encoder",
    "Triton: queues, copies",
    "client, protocol, network",
)


def export(architecture: str, folder: Path) -> tuple[float, int]:
    """What radapter-export does, with a label set; its seconds, and the checkpoint's size in
    bytes.
    """
    from radapter_export import ExportSettings, export_release  # only in the process that exports

    _, adapter, size = random_clip(architecture, folder)
    names = folder / "names.txt"
    names.write_text("\n".join(CLASS_NAMES), encoding="utf-8")
    start = time.perf_counter()
    merged = folder / "merged"
    repository = folder / "repository"
    export_release(
        adapter,
        [0.5],
        ExportSettings(merged=merged, model_repository=repository, label_sets={LABEL_SET: names}),
    )
    return time.perf_counter() - start, size


def options_of(config: Path) -> onnxruntime.SessionOptions:
    """The options with which the server runs an encoder, from its config.pbtxt."""
    parsed = text_format.Parse(config.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    options = onnxruntime.SessionOptions()
    for key, parameter in parsed.parameters.items():
        if key == "intra_op_thread_count":
            options.intra_op_num_threads = int(parameter.string_value)
        elif key.startswith("session."):
            options.add_session_config_entry(key, parameter.string_value)
    return options


class Local:
    """The server's tasks in this process.

    Args:
        repository: with release 1.
        options: for its ONNX Runtime session.
    """

    def __init__(self, repository: Path, options: onnxruntime.SessionOptions) -> None:
        path = repository / "image_encoder" / "1" / "model.onnx"
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        folder = repository / "classify" / "1"
        no_tokenizer: Any = None  # no request here brings labels of its own
        self._release = LoadedRelease(
            Release.load(folder),
            self,
            no_tokenizer,
            read_label_sets=lambda loaded: load_label_sets(folder / "label_sets"),
        )
        self.encoding: list[float] = []

    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        start = time.perf_counter()
        (embeds,) = self._session.run(["image_embeds"], {"image": pixels})
        self.encoding.append(time.perf_counter() - start)
        return np.asarray(embeds)

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        raise NotImplementedError

    def tokens(self, tokens: NDArray[np.int32], alpha: Alpha | None = None) -> NDArray[np.float32]:
        raise NotImplementedError

    def close(self) -> None:
        """The session goes with its last user."""

    def classify(self, images: Sequence[bytes]) -> list[str]:
        """The best label of each image, which are a request each."""
        labels = Labels(label_set=LABEL_SET)
        requests = [ClassifyRequest([image], labels) for image in images]
        best = []
        for answer in run_together([classify(self._release, one) for one in requests]):
            if isinstance(answer, RAdapterError):
                raise answer
            best.append(answer[0].labels[0])
        return best


def counters(server: TritonServer) -> dict[str, dict[str, float]]:
    """The server's statistics of each model since its start: requests, executions, seconds in all
    and in compute.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.http_url}/v2/models/stats") as response:
        models = json.load(response)["model_stats"]
    return {
        model["name"]: {
            "requests": model["inference_stats"]["success"]["count"],
            "executions": model["execution_count"],
            "all": model["inference_stats"]["success"]["ns"] / 1e9,
            "compute": model["inference_stats"]["compute_infer"]["ns"] / 1e9,
        }
        for model in models
    }


class Caller:
    """A candidate at concurrency 1: each run calls `count` times, one call after another, and
    returns their median.

    Keeps the seconds of every call, and the mean seconds of the stages in every run.
    """

    def __init__(
        self, call: Callable[[], object], count: int, source: Local | TritonServer
    ) -> None:
        self._call = call
        self._count = count
        self._source = source
        self.calls: list[float] = []
        self.stages: list[list[float]] = []

    def __call__(self) -> float:
        before = counters(self._source) if isinstance(self._source, TritonServer) else {}
        calls = []
        for _ in range(self._count):
            start = time.perf_counter()
            self._call()
            calls.append(time.perf_counter() - start)
        mean = statistics.mean(calls)
        if isinstance(self._source, TritonServer):
            after = counters(self._source)
            (all_, work), (encoder_all, encoder) = (
                [
                    (after[model][key] - before[model][key]) / self._count
                    for key in ("all", "compute")
                ]
                for model in ("classify", "image_encoder")
            )
            stages = [work - encoder_all, encoder, all_ - work + encoder_all - encoder, mean - all_]
        else:
            encoder = statistics.mean(self._source.encoding[-self._count :])
            stages = [mean - encoder, encoder, 0.0, 0.0]
        self.calls += calls
        self.stages.append(stages)
        return statistics.median(calls)


def together(call: Callable[[], object], count: int, pool: ThreadPoolExecutor) -> float:
    """Seconds for `count` calls by the threads of a pool."""
    start = time.perf_counter()
    for future in [pool.submit(call) for _ in range(count)]:
        future.result()
    return time.perf_counter() - start


def main(
    architecture: str = "ViT-B-32",
    calls: int = 20,
    repeats: int = 10,
    concurrency: int = 8,
    out: Path = RESULTS,
) -> None:
    """Measure classify, served and in-process.

    Args:
        architecture: open_clip architecture, with random weights and an adapter.
        calls: calls of each candidate in a round at concurrency 1; at more, `concurrency` times 8
            images.
        repeats: rounds.
        concurrency: callers at once.
        out: folder of the table.
    """
    report = Report(
        "serving",
        f"Classify: {architecture}, served and in-process",
        f"A JPEG of 640 x 480 pixels against a label set of {len(CLASS_NAMES)} labels. In-process,"
        " the baseline, runs the server's own task code over an ONNX Runtime session with the"
        " options that the encoder has in the server. Client, server and in-process share the"
        " machine and take turns.",
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("exporting")
        with Process() as process:
            seconds, size = process.call(export, architecture, folder)
            peak = process.peak()
        repository = folder / "repository"
        jpeg = picture(640, 480)
        local = Local(repository, options_of(repository / "image_encoder" / "config.pbtxt"))
        plain = Local(repository, onnxruntime.SessionOptions())
        say("starting the server")
        server = stack.enter_context(
            TritonServer(ServerConfig(repository, Endpoints.on_free_ports()))
        )
        grpc, http = (
            stack.enter_context(Client(url)) for url in (server.grpc_url, server.http_url)
        )
        local_call = partial(local.classify, [jpeg])
        grpc_call, http_call = (
            partial(client.classify, jpeg, label_set=LABEL_SET) for client in (grpc, http)
        )
        assert grpc_call().labels[0] == http_call().labels[0] == local_call()[0]

        callers = {
            "in-process": Caller(local_call, calls, local),
            "in-process, ONNX Runtime's defaults": Caller(
                partial(plain.classify, [jpeg]), calls, plain
            ),
            "gRPC": Caller(grpc_call, calls, server),
            "HTTP": Caller(http_call, calls, server),
        }
        say(f"concurrency 1: {repeats} rounds and a warm-up of {len(callers)} x {calls} calls")
        times = alternate(callers, repeats)
        rows = []
        for name, caller in callers.items():
            cuts = statistics.quantiles(caller.calls[calls:], n=20)
            more = statistics.median(
                a - b for a, b in zip(times[name], times["in-process"], strict=True)
            )
            cells = [f"{1e3 * cuts[9]:.1f}", f"{1e3 * cuts[18]:.1f}"]
            rows.append(
                [
                    name,
                    *cells,
                    f"{ratio(times[name], times['in-process']):.2f}",
                    f"{1e3 * more:+.1f}",
                ]
            )
        report.table(
            "Concurrency 1", ["candidate", "p50 ms", "p95 ms", "ratio of p50", "more ms"], rows
        )
        report.note("Aim: at most 5 ms more than in-process.")
        rows = [
            [
                stage,
                *(
                    f"{1e3 * statistics.median(run[n] for run in c.stages[1:]):.1f}"
                    for c in callers.values()
                ),
            ]
            for n, stage in enumerate(STAGES)
        ]
        report.table(
            "Where the time of a call goes, ms (from the server's statistics)",
            ["stage", *callers],
            rows,
        )

        images = 8 * concurrency
        pool = stack.enter_context(ThreadPoolExecutor(concurrency))
        alone = stack.enter_context(ThreadPoolExecutor(1))
        before = counters(server)["classify"]
        many = {
            f"in-process, {concurrency} threads": partial(together, local_call, images, pool),
            f"in-process, batches of {concurrency}": partial(
                together,
                partial(local.classify, [jpeg] * concurrency),
                images // concurrency,
                alone,
            ),
            "gRPC": partial(together, grpc_call, images, pool),
            "HTTP": partial(together, http_call, images, pool),
        }
        say(
            f"concurrency {concurrency}: {repeats} rounds and a warm-up of {len(many)} x {images}"
            " images"
        )
        times = alternate(many, repeats)
        after = counters(server)["classify"]
    best = min(list(many)[:2], key=lambda name: statistics.median(times[name]))
    rows = [
        [
            name,
            f"{images / statistics.median(times[name]):.1f}",
            f"{1 / ratio(times[name], times[best]):.2f}",
        ]
        for name in many
    ]
    report.table(f"Concurrency {concurrency}", ["candidate", "images/s", "ratio"], rows)
    at_once = (after["requests"] - before["requests"]) / (
        after["executions"] - before["executions"]
    )
    report.note(
        f"Ratio: to {best}. The server ran {at_once:.1f} requests together. Aim: at least 0.85."
    )
    report.note(
        f"The export took {seconds:.0f} s and at most {peak / 1e6:.0f} MB, {peak / size:.1f} x the"
        " checkpoint."
    )
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
