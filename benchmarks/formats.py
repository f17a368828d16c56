"""The encoders in every precision and by every runtime of this CPU: time, size, distance from
torch, task accuracy.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import CLASS_NAMES, RESULTS, Report, alternate, clocked, random_clip, ratio, say
from numpy.typing import NDArray
from torch import Tensor

from radapter_export import ExportSettings, export_release
from radapter_export.graph import Graph, image_graph, text_graph
from radapter_export.precision import TYPES, lower, quantize
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import causal_text_features
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, Tolerance, compare

FORMATS = {
    "fp32": ("onnxruntime", "openvino"),
    "fp16": ("onnxruntime", "openvino"),
    "bf16": ("openvino",),
    "int8 dynamic": ("onnxruntime", "openvino"),
    "int8 static": ("onnxruntime", "openvino"),
}
IMAGES = "images"
TEXTS = "short texts"
GRAPHS = {IMAGES: "image_encoder", TEXTS: "text_encoder"}


def torch_towers(base: Base) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return open_clip's towers with the preprocessing that the encoders do."""
    model: Any = base.model
    mean, std = (torch.tensor(base.preprocess[key]) for key in ("mean", "std"))

    def images(image: Tensor) -> Tensor:
        pixels = ((image / 255 - mean) / std).permute(0, 3, 1, 2)
        return F.normalize(model.encode_image(pixels), dim=-1)

    def texts(tokens: Tensor) -> Tensor:
        return F.normalize(causal_text_features(model, tokens), dim=-1)

    return {IMAGES: images, TEXTS: texts}


def batch_of(base: Base, case: str, size: int) -> NDArray[Any]:
    """Make an encoder's input: uint8 [B, S, S, 3], or int32 [B, L] of prompts, cropped to the
    longest.
    """
    if case == IMAGES:
        visual: Any = base.model.visual
        side = visual.image_size[0]
        return np.random.default_rng(0).integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    tokens: Tensor = base.tokenizer([f"a photo of a {name}." for name in CLASS_NAMES[:size]])
    tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
    return tokens.to(torch.int32).numpy()


def write(
    graph: Graph, form: str, weights: dict[str, Tensor], base: Base, folder: Path
) -> tuple[Path, int]:
    """Write an encoder, with ranges of int8 from the timed inputs; return its path and size."""
    path = folder / graph.name / form / "model.onnx"
    path.parent.mkdir(parents=True)
    lowered = lower(graph, form) if form in TYPES else graph
    size = lowered.save(weights, path)
    if form.startswith("int8"):
        case = next(case for case, name in GRAPHS.items() if name == graph.name)
        size = quantize(path, [batch_of(base, case, 8)] if form.endswith("static") else ())
    return path, size


@torch.no_grad()
def main(
    architecture: str = "ViT-B-32",
    batches: tuple[int, ...] = (1, 8, 32),
    repeats: int = 5,
    run: Path | None = None,
    calibration: str | None = None,
    validation: str | None = None,
    out: Path = RESULTS,
) -> None:
    """Measure the formats.

    Args:
        architecture: open_clip architecture, with random weights and a folded adapter.
        batches: batch sizes.
        repeats: rounds; in each a candidate runs for at least 0.3 s.
        run: of radapter-train, exported in every format for its task accuracy; left out if none is
            given.
        calibration: images for int8 static of that run.
        validation: data to evaluate that run on; its own if none is given.
        out: folder of the table.
    """
    report = Report(
        "formats",
        f"Precisions and runtimes, {architecture}",
        "From uint8 pixels or token ids to unit-length embeddings; random weights, short texts"
        " cropped to the longest. Ratios are of torch eager's time (open_clip's own code, fp32) to"
        " the candidate's: above 1 is faster.",
    )
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip, adapter, _ = random_clip(architecture, folder)
        base = load_base(clip)
        weights = fold(base.model.state_dict(), load_adapter(adapter), 0.5)
        base.model.load_state_dict(weights)
        towers = torch_towers(base)
        graphs = {IMAGES: image_graph(base), TEXTS: text_graph(base)}
        for case, graph in graphs.items():
            arrays = {size: batch_of(base, case, size) for size in batches}
            tensors = {size: torch.from_numpy(array) for size, array in arrays.items()}
            samples = Samples(
                [*arrays.values()], [towers[case](tensor).numpy() for tensor in tensors.values()]
            )
            encoders = {}
            rows = {}
            for form, runtimes in FORMATS.items():
                say(f"{case}: {form}")
                path, size = write(graph, form, weights, base, folder)
                for runtime in runtimes:
                    encoder = EncoderGraph(
                        path, runtime, precision=form.partition(" ")[0], threads=threads
                    )
                    agreement = compare(graph.name, encoder, samples, Tolerance(1.0))
                    distance = f"{1 - agreement.min_cosine:.0e}"
                    encoders[form, runtime] = encoder
                    rows[form, runtime] = [
                        f"{form}, {runtime}",
                        f"{size / 1e6:.0f}",
                        f"{agreement.max_error:.0e}",
                        distance,
                    ]
            rows["torch", ""] = ["torch eager", "", "", ""]
            for size, array in arrays.items():
                say(f"{case}, batch {size}: {repeats} rounds")
                candidates = {("torch", ""): clocked(partial(towers[case], tensors[size]))}
                candidates |= {
                    key: clocked(partial(encoder, array)) for key, encoder in encoders.items()
                }
                times = alternate(candidates, repeats)
                for key, taken in times.items():
                    faster = ratio(times["torch", ""], taken)
                    rows[key] += [f"{1e3 * statistics.median(taken):.0f}", f"{faster:.2f}"]
            columns = [
                "encoder",
                "MB",
                "max error",
                "1 − cosine",
                *(c for b in batches for c in (f"ms at {b}", "ratio")),
            ]
            report.table(case, columns, list(rows.values()))
    if run is not None:
        report.table("Task accuracy", *_accuracies(run, calibration, validation))
    report.note(
        "Aim: int8 or bf16 at least 3 times as fast as torch eager, for at most 0.5 points."
    )
    report.write(out)


def _accuracies(
    run: Path, calibration: str | None, validation: str | None
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for form, (runtime, *_) in FORMATS.items():
        if form == "int8 static" and calibration is None:
            continue
        say(f"{run}: {form}")
        with tempfile.TemporaryDirectory() as name:
            fields: dict[str, Any] = {
                "model_repository": Path(name, "repository"),
                "merged": Path(name, "merged"),
                "precision": form.partition(" ")[0],
                "runtime": runtime,
                "calibration": calibration if form == "int8 static" else None,
                "validation": validation or load_adapter(run).metadata.source.val_data,
                "max_drop": 100,
            }
            (release,) = export_release(run, None, ExportSettings(**fields))
        accuracy: Any = release.accuracy
        if accuracy is None:
            raise RAdapterError(
                f"the run {run} has no validation data; give some with --validation"
            )
        rows.append(
            [
                form,
                str(accuracy.n),
                f"{accuracy.torch:.2f}",
                f"{accuracy.release:.2f}",
                f"{accuracy.drop:.2f}",
            ]
        )
    return [
        "encoders",
        "images",
        f"{accuracy.metric} of torch, %",
        "of the release, %",
        "points lost",
    ], rows


if __name__ == "__main__":
    tyro.cli(main)
