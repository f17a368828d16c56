"""Everything on one GPU in one call: training steps, and the towers through every runtime that is
installed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from common import CLASS_NAMES, RESULTS, Report, alternate, clocked, random_clip, ratio, say
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.errors import RAdapterError, reason

EAGER = "torch eager"
COMPILE = "torch.compile"
FLASH = "torch flash"
ONNX = "ONNX Runtime"
TENSORRT = "TensorRT"
IMAGES = "images"
TEXTS = "texts"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMOKE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
Run = Callable[[], Tensor]


class Flash(nn.Module):
    """An `nn.MultiheadAttention` of the same parameters whose attention is torch's flash kernel,
    where that can be.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.original = original

    def forward(
        self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """[B, L, D]; a mask means: causal, which is all that CLIP's text tower has."""
        attention = self.original
        batch, length, width = x.shape
        heads = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(
            -1, (3, attention.num_heads, -1)
        )
        q, k, v = (heads[:, :, part].transpose(1, 2) for part in range(3))
        with sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        ):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=attn_mask is not None)
        return attention.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None


@dataclass
class Bench:
    """Report, device and settings, which all parts share."""

    report: Report  # takes the tables
    device: str  # cuda or cpu
    precision: str  # of the towers
    repeats: int  # rounds
    deadline: float  # when all has to be done, by `time.monotonic`
    # folder of the results, which are written after every table: a call may be cut off, a library
    # may crash
    out: Path
    # measured operations a second of a matmul, by type
    peaks: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """One thing to measure: what fails, is not installed or has no time is left out and named,
        the rest goes on.
        """
        say(name)
        try:
            yield
        except Exception as error:  # whatever a library does on a card that nobody has tried
            self.report.note(f"Left out: {name}: {type(error).__name__}: {reason(error)}")
            self.report.write(self.out)
        if self.device == "cuda":
            with contextlib.suppress(RuntimeError):  # an error of the GPU before stays
                torch.cuda.empty_cache()

    def need(self, seconds: float) -> None:
        """Raise a `TimeoutError` unless there is so much time left."""
        if time.monotonic() + seconds > self.deadline:
            raise TimeoutError("the time was up")

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Add or renew a table, and write all that there is."""
        self.report.table(title, columns, rows)
        self.report.write(self.out)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        """Seconds of a call of each, in alternating rounds."""

        def waited(run: Run) -> None:
            run()
            self.synchronize()

        return alternate(
            {name: clocked(partial(waited, run), 0.1) for name, run in runs.items()}, self.repeats
        )

    def share(self, flops: float, seconds: float, kind: str) -> str:
        """Of the measured peak of a type, in %."""
        return f"{100 * flops / seconds / self.peaks[kind]:.0f}" if kind in self.peaks else "-"


def matmul(bench: Bench, size: int) -> None:
    """Measure the most that the machine does: a square matmul in each type."""
    rows = []
    for name in dict.fromkeys(("fp32", bench.precision, "bf16")):
        a, b = (torch.randn(size, size, device=bench.device, dtype=TYPES[name]) for _ in range(2))
        seconds = statistics.median(bench.timed({name: partial(torch.matmul, a, b)})[name])
        bench.peaks[name] = 2 * size**3 / seconds
        rows.append(
            [f"{name}, {size} x {size}", f"{1e3 * seconds:.2f}", f"{bench.peaks[name] / 1e12:.2f}"]
        )
    bench.table("Matmul", ["", "ms", "TFLOP/s"], rows)


def training(bench: Bench, architecture: str, batch: int) -> None:
    """A training step in bf16 of adapters and of full fine-tuning."""
    from training_step import FULL, Step

    bench.need(40)
    names = [
        FULL,
        "activation form, full rank",
        "weight form, full rank",
        "activation form, rank 4",
    ]
    steps = {}
    peaks = {}
    flops = {}
    for name in names:
        held = torch.cuda.memory_allocated() if bench.device == "cuda" else 0
        steps[name] = Step(name, architecture, batch, bench.device, torch.bfloat16)
        steps[name](0)
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as counter:
            steps[name](1)
        flops[name] = counter.get_total_flops()
        peaks[name] = torch.cuda.max_memory_allocated() - held if bench.device == "cuda" else 0
    times = alternate({name: partial(step, 2) for name, step in steps.items()}, bench.repeats)
    rows = []
    for name in names:
        seconds = statistics.median(times[name])
        memory = (
            [f"{peaks[name] / 1e9:.2f}", f"{peaks[name] / peaks[FULL]:.2f}"]
            if peaks[FULL]
            else ["-", "-"]
        )
        figures = (
            f"{1e3 * seconds:.0f}",
            f"{batch / seconds:.0f}",
            f"{ratio(times[name], times[FULL]):.2f}",
        )
        rows.append([name, *figures, *memory, bench.share(flops[name], seconds, "bf16")])
    columns = ["candidate", "ms", "images/s", "ratio", "peak GB", "ratio ", "% of matmul"]
    bench.table(f"A training step of {architecture}, batch {batch}, bf16", columns, rows)


class Towers:
    """One folded CLIP: its towers in torch, and its graphs."""

    def __init__(self, bench: Bench, architecture: str, folder: Path) -> None:
        self.bench = bench
        self.name = architecture
        self.folder = folder
        name, adapter, _ = random_clip(architecture, folder)
        self.base: Base = load_base(name)
        self.weights = fold(self.base.model.state_dict(), load_adapter(adapter), 0.5)
        self.base.model.load_state_dict(self.weights)
        self.reference: Any = self.base.model.to(bench.device)

    def batch(self, case: str, size: int) -> Tensor:
        """uint8 [B, S, S, 3], or int32 [B, 77]."""
        if case == IMAGES:
            side = self.reference.visual.image_size[0]
            draw = torch.Generator().manual_seed(0)
            return torch.randint(
                0, 256, (size, side, side, 3), dtype=torch.uint8, generator=draw
            ).to(self.bench.device)
        names = [CLASS_NAMES[row % len(CLASS_NAMES)] for row in range(size)]
        tokens: Tensor = self.base.tokenizer([f"a photo of a {name}." for name in names])
        return tokens.int().to(self.bench.device)

    def torch(self, case: str, model: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """From raw input to unit-length embeddings by a model in this type."""
        preprocess = self.base.preprocess
        mean, std = (
            torch.tensor(preprocess[key], device=self.bench.device) for key in ("mean", "std")
        )

        def images(image: Tensor) -> Tensor:
            pixels = ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
            return F.normalize(model.encode_image(pixels).float(), dim=-1)

        def texts(tokens: Tensor) -> Tensor:
            return F.normalize(model.encode_text(tokens).float(), dim=-1)

        return images if case == IMAGES else texts

    def flops(self, case: str) -> float:
        """Operations a row, counted with torch without computing anything."""
        model = deepcopy(self.reference).to("meta")
        # With gradients, for the fused attention that torch takes without them is not counted.
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            if case == IMAGES:
                model.encode_image(torch.empty(1, 3, *model.visual.image_size, device="meta"))
            else:
                model.encode_text(torch.zeros(1, 77, dtype=torch.int32, device="meta"))
        return float(counter.get_total_flops())

    def graph(self, case: str) -> Path:
        """The graph as radapter-export writes it in this precision."""
        from radapter_export.graph import image_graph, text_graph
        from radapter_export.precision import lower

        path = self.folder / f"{case}.onnx"
        precision = self.bench.precision
        if not path.exists():
            graph = (image_graph if case == IMAGES else text_graph)(self.base)
            (graph if precision == "fp32" else lower(graph, precision)).save(self.weights, path)
        return path


def onnxruntime(towers: Towers, case: str) -> Callable[[Tensor], Run]:
    """The graph in ONNX Runtime, reading and writing the GPU's memory where there is one; for a
    batch, what runs it.
    """
    import onnxruntime as ort

    from radapter_serve.encoders.runtimes import CUDA, cuda_provider

    if towers.bench.device == "cpu":
        session = ort.InferenceSession(towers.graph(case), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda batch: lambda: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
    session = ort.InferenceSession(towers.graph(case), providers=[cuda_provider()])
    used = session.get_providers()[0]
    if used != CUDA:
        raise RAdapterError(
            f"ONNX Runtime fell back to {used}; install onnxruntime-gpu with CUDA and cuDNN"
        )

    def bind(batch: Tensor) -> Run:
        binding = session.io_binding()
        out = torch.empty(len(batch), towers.base.config["embed_dim"], device="cuda")
        source = session.get_inputs()[0].name
        target = session.get_outputs()[0].name
        kind = np.uint8 if batch.dtype == torch.uint8 else np.int32
        binding.bind_input(source, "cuda", 0, kind, tuple(batch.shape), batch.data_ptr())
        binding.bind_output(target, "cuda", 0, np.float32, tuple(out.shape), out.data_ptr())

        def run() -> Tensor:
            session.run_with_iobinding(binding)
            return out

        return run

    return bind


def tensorrt(towers: Towers, case: str, batches: tuple[int, ...]) -> Callable[[Tensor], Run]:
    """The graph as an engine of TensorRT, or of its RTX edition where only that is installed; for
    these very texts.
    """
    from radapter_serve.encoders.tensorrt import TensorRTEngine, build, find_gpu, import_tensorrt

    find_gpu()
    try:
        trt = import_tensorrt()
    except RAdapterError:
        trt = importlib.import_module("tensorrt_rtx")
    start = time.perf_counter()
    usual = statistics.median_high(batches)
    limits: dict[str, Any] = {"max_batch_size": max(batches), "max_length": 77, "opt_length": 77}
    plan = build(trt, towers.graph(case), opt_batch_size=usual, **limits)
    engine = TensorRTEngine(trt, plan)
    took = f"{time.perf_counter() - start:.0f} s, {len(plan) / 1e6:.0f} MB"
    tuned = f"{towers.name}, {case}, tuned for batches of {usual}"
    towers.bench.report.note(f"{trt.__name__} {trt.__version__}, engine of {tuned}: {took}.")
    stream = torch.cuda.Stream()

    def bind(batch: Tensor) -> Run:
        [source] = engine.inputs
        [target] = engine.outputs
        out = torch.empty(engine.shapes({source: tuple(batch.shape)})[target], device="cuda")
        addresses = {source: batch.data_ptr(), target: out.data_ptr()}

        def run() -> Tensor:
            engine.enqueue(addresses, stream.cuda_stream)
            return out

        return run

    return bind


class Inference:
    """One tower at every batch, by candidate, each beside torch eager in the same rounds."""

    def __init__(self, towers: Towers, case: str, batches: tuple[int, ...]) -> None:
        self.bench = towers.bench
        self.towers = towers
        self.case = case
        self.batches = batches
        self.title = f"{towers.name}, {case}, {self.bench.precision}"
        self.flops = towers.flops(case)
        self.eager = self.run(self.model())
        self._rows: dict[tuple[int, str], list[str]] = {}

    def model(self) -> Any:
        """A copy in the precision of the towers."""
        return deepcopy(self.towers.reference).to(TYPES[self.bench.precision])

    def flash(self) -> Callable[[Tensor], Tensor]:
        """Torch with flash attention."""
        model = self.model()
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.MultiheadAttention):
                    setattr(module, name, Flash(child))
        return self.run(model)

    def run(self, model: Any) -> Callable[[Tensor], Tensor]:
        """From raw input to embeddings by a model of torch."""
        return self.towers.torch(self.case, model, TYPES[self.bench.precision])

    def compiled(self, batch: Tensor) -> Run:
        """torch.compile for the very shape."""
        torch.compiler.reset()
        return partial(torch.compile(self.eager, dynamic=False), batch)

    def bind(self, name: str) -> Callable[[Tensor], Run]:
        """A candidate: for a batch, what runs it."""
        if name == ONNX:
            return onnxruntime(self.towers, self.case)
        if name == TENSORRT:
            return tensorrt(self.towers, self.case, self.batches)
        if name == COMPILE:
            return self.compiled
        torchs = self.flash() if name == FLASH else self.eager
        return lambda batch: partial(torchs, batch)

    def measure(self, name: str, batches: tuple[int, ...]) -> None:
        """Measure a candidate at some batches."""
        with self.bench.item(f"{self.title}: {name}"):
            self.bench.need({ONNX: 40, TENSORRT: 100}.get(name, 5))
            bind = self.bind(name)
            for size in batches:
                with self.bench.item(f"{self.title}, batch {size}: {name}"):
                    self.bench.need(80 if name == COMPILE else 5)
                    batch = self.towers.batch(self.case, size)
                    self._measure(
                        name, batch, {EAGER: partial(self.eager, batch), name: bind(batch)}
                    )

    def _measure(self, name: str, batch: Tensor, runs: dict[str, Run]) -> None:
        bench = self.bench
        towers = self.towers
        size = len(batch)
        expected = towers.torch(self.case, towers.reference, torch.float32)(batch)
        for which, run in runs.items():
            embeds = run()
            bench.synchronize()
            worst = float((1 - F.cosine_similarity(embeds, expected)).max())
            if not worst < 1e-2:
                raise RuntimeError(f"{which} differs from torch in fp32: 1 - cosine is {worst:.1e}")
        times = bench.timed(runs)
        seconds = statistics.median(times[name])
        figures = (
            f"{1e3 * seconds:.2f}",
            f"{size / seconds:.0f}",
            f"{ratio(times[name], times[EAGER]):.2f}",
        )
        share = bench.share(self.flops * size, seconds, bench.precision)
        self._rows[size, name] = [f"{size}, {name}", *figures, share]
        order = [EAGER, FLASH, COMPILE, ONNX, TENSORRT]
        rows = [
            self._rows[key]
            for key in sorted(self._rows, key=lambda key: (key[0], order.index(key[1])))
        ]
        bench.table(
            self.title, ["batch, candidate", "ms", f"{self.case}/s", "ratio", "% of matmul"], rows
        )


@torch.no_grad()
def main(
    architectures: tuple[str, ...] = ("ViT-B-32", "ViT-B-16", "ViT-L-14"),
    batches: tuple[int, ...] = (1, 8, 32, 128, 512),
    compile_batches: tuple[int, ...] = (1, 512),
    train_batch: int = 128,
    precision: Literal["fp32", "fp16", "bf16"] = "fp16",
    repeats: int = 5,
    minutes: float = 9.5,
    smoke: bool = False,
    out: Path = RESULTS,
) -> None:
    """Measure what a GPU does with this project, in one call.

    Needs torch, open_clip_torch, rich and tyro, for the towers onnx and onnxscript too; no network,
    no data, and no
    installation of this project: PYTHONPATH=.:export python benchmarks/gpu.py. Measures what is
    installed of onnxruntime-gpu, tensorrt and, where there is no tensorrt, tensorrt_rtx (needs
    nothing else); what is not there, or does not work on this card, is named and left out. Writes
    OUT/gpu-CARD.md after every table.

    Args:
        architectures: open_clip architectures, with random weights and a folded adapter.
        batches: batch sizes of the towers; texts, of 77 tokens, for the first architecture only.
        compile_batches: those at which torch.compile is measured, which takes most of the time.
        train_batch: pairs in a training step.
        precision: of the towers; training is in bf16.
        repeats: rounds; in each a candidate runs for at least 0.1 s.
        minutes: nothing is begun that may not be done by then.
        smoke: a tiny model on the CPU, to see that the script works.
        out: folder of the table.
    """
    if smoke:
        folder = tempfile.TemporaryDirectory()
        Path(folder.name, "smoke.json").write_text(json.dumps(SMOKE), encoding="utf-8")
        open_clip.add_model_config(folder.name)
        architectures = ("smoke",)
        device = "cpu"
        size = 64
    elif not torch.cuda.is_available():
        raise SystemExit(
            "gpu.py: no GPU: torch.cuda.is_available() is False here; --smoke runs on the CPU"
        )
    else:
        device = "cuda"
        size = 8192
    torch.backends.cudnn.allow_tf32 = False
    card = torch.cuda.get_device_name() if device == "cuda" else "smoke"
    report = Report(
        "gpu",
        f"On {card}",
        f"Towers in {precision} from uint8 pixels or token ids to unit-length embeddings, on the"
        " GPU already; fp32 is without TF32. torch eager is open_clip's own code, torch flash the"
        " same with flash attention, torch.compile compiled for the very shape; ratios are to"
        " torch eager, or to full fine-tuning. The percentage is the operations that torch counts,"
        " over those that the measured matmul makes in that time.",
        file=f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', card)}",
    )
    bench = Bench(report, device, precision, repeats, time.monotonic() + 60 * minutes, out)
    with bench.item("matmul"):
        matmul(bench, size)
    for architecture in architectures:
        with bench.item(f"training {architecture}"), torch.enable_grad():
            training(bench, architecture, train_batch)
    with contextlib.ExitStack() as stack:
        towers = []
        for number, architecture in enumerate(architectures):
            with bench.item(architecture):
                files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                pair = Towers(bench, architecture, files)
                cases = (IMAGES, TEXTS) if number == 0 else (IMAGES,)
                towers += [Inference(pair, case, batches) for case in cases]
        # What may end the process, or takes longest, comes last.
        for name in (EAGER, FLASH, ONNX, TENSORRT, COMPILE):
            for tower in towers:
                tower.measure(name, compile_batches if name == COMPILE else batches)
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
