"""The encoders in every precision and by every runtime of this CPU: time, size, distance from
torch, task accuracy.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
import tyro
from common import RESULTS, Report, alternate, clocked, random_clip, ratio, say
from torch import Tensor
from towers import IMAGE, SHORT, batch_of, torch_towers

from radapter_export import ExportSettings, export_release
from radapter_export.graph import Graph, image_graph, text_graph
from radapter_export.precision import TYPES, lower
from radapter_export.quantization import quantize
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare

FORMATS = {
    "fp32": ("onnxruntime", "openvino"),
    "fp16": ("onnxruntime", "openvino"),
    "bf16": ("openvino",),
    "int8 dynamic": ("onnxruntime", "openvino"),
    "int8 static": ("onnxruntime", "openvino"),
}
GRAPHS = {IMAGE: "image_encoder", SHORT: "text_encoder"}


def write(
    graph: Graph, form: str, weights: dict[str, Tensor], base: Base, folder: Path
) -> tuple[Path, int]:
    """An encoder's file, and its size in bytes; ranges of int8 are found by the very inputs that
    are timed.
    """
    path = folder / graph.name / form / "model.onnx"
    path.parent.mkdir(parents=True)
    made = lower(graph, form) if form in TYPES else graph
    size = made.save(weights, path)
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
        graphs = {IMAGE: image_graph(base), SHORT: text_graph(base)}
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
                    found = compare(graph.name, encoder, samples, 1.0)
                    distance = f"{1 - found.min_cosine:.0e}"
                    encoders[form, runtime] = encoder
                    rows[form, runtime] = [
                        f"{form}, {runtime}",
                        f"{size / 1e6:.0f}",
                        f"{found.max_error:.0e}",
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
            (release,) = export_release(
                run,
                None,
                ExportSettings(
                    model_repository=Path(name, "repository"),
                    merged=Path(name, "merged"),
                    precision=form.partition(" ")[0],
                    runtime=runtime,
                    calibration=calibration if form == "int8 static" else None,
                    validation=validation or load_adapter(run).metadata.source.val_data,
                    max_drop=100,
                ),
            )
        found = release.accuracy
        if found is None:
            raise RAdapterError(
                f"the run {run} has no validation data; give some with --validation"
            )
        rows.append(
            [form, str(found.n), f"{found.torch:.2f}", f"{found.release:.2f}", f"{found.drop:.2f}"]
        )
    return [
        "encoders",
        "images",
        f"{found.metric} of torch, %",
        "of the release, %",
        "points lost",
    ], rows


if __name__ == "__main__":
    tyro.cli(main)
