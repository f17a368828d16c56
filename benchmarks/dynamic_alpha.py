"""α as an input of the encoders against α folded in."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from common import RESULTS, Report, alternate, clocked, random_clip, ratio, say
from towers import IMAGE, LONG, batch_of

from radapter_export.graph import image_graph, text_graph
from radapter_serve.adapter import Adapter, fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.encoders.encoder import EncoderGraph

FOLDED = "folded"
FULL = "full rank"


def low_rank(adapter: Adapter, rank: int) -> Adapter:
    """Random values of another rank for the layers of an adapter."""
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for key, matrix in adapter.tensors.items():
        for name, shape in (("up", (len(matrix), rank)), ("down", (rank, len(matrix)))):
            tensors[f"{key}.{name}"] = torch.randn(shape, generator=generator) * 0.03
    return Adapter(tensors, dataclasses.replace(adapter.metadata, rank=rank))


def encoders(
    base: Base, adapter: Adapter, ranks: tuple[int, ...], folder: Path
) -> dict[str, dict[str, EncoderGraph]]:
    """Of images and of texts: the adapter folded in, then adapters beside their layers."""
    state = dict(base.model.state_dict())
    beside = {FULL: adapter} | {f"rank {rank}": low_rank(adapter, rank) for rank in ranks}
    found: dict[str, dict[str, EncoderGraph]] = {}
    for case, make in ((IMAGE, image_graph), (LONG, text_graph)):
        say(f"exporting {case}")
        make(base).save(fold(state, adapter, 0.5), folder / "model.onnx")
        found[case] = {FOLDED: EncoderGraph(folder / "model.onnx")}
        for name, dynamic in beside.items():
            make(base, dynamic).save({**state, **dynamic.tensors}, folder / "model.onnx")
            found[case][name] = EncoderGraph(folder / "model.onnx")
    return found


def overhead(
    report: Report,
    base: Base,
    adapter: Adapter,
    ranks: tuple[int, ...],
    batches: tuple[int, ...],
    repeats: int,
) -> None:
    """Add the table of times a batch."""
    with tempfile.TemporaryDirectory() as folder:
        cases = encoders(base, adapter, ranks, Path(folder))
    rows = []
    for case, candidates in cases.items():
        for size in batches:
            values = batch_of(base, case, size)
            alpha = np.full((size, 1), 0.5, np.float32)
            error = float(
                np.abs(candidates[FOLDED](values) - candidates[FULL](values, alpha)).max()
            )
            assert error < 1e-5, (
                f"{case}, batch {size}: the graph with alpha is {error} from the fold"
            )
            say(f"{case}, batch {size}: {repeats} rounds")
            times = alternate(
                {
                    name: clocked(partial(encoder, values, *([] if name == FOLDED else [alpha])))
                    for name, encoder in candidates.items()
                },
                repeats,
            )
            cells = [f"{1e3 * statistics.median(times[FOLDED]):.1f}"]
            for name in list(candidates)[1:]:
                cells += [
                    f"{1e3 * statistics.median(times[name]):.1f}",
                    f"{ratio(times[name], times[FOLDED]):.2f}",
                ]
            rows.append([case, str(size), *cells])
    columns = ["input", "batch", f"{FOLDED} ms"]
    for number, name in enumerate(list(cases[IMAGE])[1:]):
        columns += [f"{name} ms", "ratio" + " " * number]
    report.table("A batch", columns, rows)
    report.note("Ratios are to the fold, which has the speed of the base.")


@torch.no_grad()
def main(
    architecture: str = "ViT-B-32",
    ranks: tuple[int, ...] = (16,),
    batches: tuple[int, ...] = (1, 8, 32),
    repeats: int = 9,
    out: Path = RESULTS,
) -> None:
    """Measure α as an input.

    Args:
        architecture: open_clip architecture, with random weights and adapters.
        ranks: low ranks beside the full one.
        batches: batch sizes.
        repeats: rounds; in each a candidate runs for at least 0.3 s.
        out: folder of the table.
    """
    report = Report(
        "dynamic",
        f"α as an input of the encoders of {architecture}",
        "ONNX Runtime, fp32, from uint8 pixels or 77 token ids to unit-length embeddings; α is 0.5"
        " in all rows. The fold has α in its weights; the others compute y + α·F·y after each"
        " adapted layer, F in full or as up·down.",
    )
    with tempfile.TemporaryDirectory() as folder:
        name, adapter, _ = random_clip(architecture, Path(folder))
        overhead(report, load_base(name), load_adapter(adapter), ranks, batches, repeats)
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
