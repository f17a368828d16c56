"""The folded towers in ONNX Runtime against torch eager and torch.compile, images, short texts and
long ones.
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

from radapter_export.graph import image_graph, text_graph
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import causal_text_features
from radapter_serve.encoders.encoder import EncoderGraph

Embed = Callable[[Tensor], Tensor]
EAGER = "torch eager"
COMPILE = "torch.compile"
ONNX = "ONNX Runtime"
IMAGE = "images"
SHORT = "short texts"
LONG = "texts of 77 tokens"


def folded_clip(architecture: str, folder: Path) -> tuple[Base, dict[str, EncoderGraph]]:
    """A CLIP with a random adapter folded in, and its encoders as radapter-export writes them."""
    name, adapter, _ = random_clip(architecture, folder)
    base = load_base(name)
    weights = fold(base.model.state_dict(), load_adapter(adapter), 0.5)
    base.model.load_state_dict(weights)
    encoders = {}
    for graph in (image_graph(base), text_graph(base)):
        say(f"exported {graph.name}")
        graph.save(weights, folder / f"{graph.name}.onnx")
        encoders[graph.name] = EncoderGraph(folder / f"{graph.name}.onnx")
    return base, encoders


def torch_towers(base: Base) -> dict[str, Embed]:
    """What the encoders do, as torch does it: open_clip's own towers; short texts are cropped for
    it, too.
    """
    model: Any = base.model
    mean, std = (torch.tensor(base.preprocess[key]) for key in ("mean", "std"))

    def images(image: Tensor) -> Tensor:
        return F.normalize(
            model.encode_image(((image / 255 - mean) / std).permute(0, 3, 1, 2)), dim=-1
        )

    def short(tokens: Tensor) -> Tensor:
        return F.normalize(causal_text_features(model, tokens), dim=-1)

    def long(tokens: Tensor) -> Tensor:
        return F.normalize(model.encode_text(tokens), dim=-1)

    return {IMAGE: images, SHORT: short, LONG: long}


def batch_of(base: Base, case: str, size: int) -> NDArray[Any]:
    """What the encoder takes: uint8 [B, S, S, 3], or int32 [B, L] of class prompts, cropped to the
    longest or not.
    """
    if case == IMAGE:
        visual: Any = base.model.visual
        side = visual.image_size[0]
        return np.random.default_rng(0).integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    tokens: Tensor = base.tokenizer([f"a photo of a {name}." for name in CLASS_NAMES[:size]])
    if case == SHORT:
        tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
    return tokens.to(torch.int32).numpy()


def compiled(embed: Embed, example: Tensor) -> tuple[Embed | None, str]:
    """`torch.compile` for exactly this shape, or why it does not work here."""
    torch.compiler.reset()
    result: Embed = torch.compile(embed, dynamic=False)
    try:
        result(example)
    except Exception as error:  # no C++ compiler, and whatever else may be missing
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return result, ""


@torch.no_grad()
def main(
    architecture: str = "ViT-B-32",
    batches: tuple[int, ...] = (1, 8, 32),
    repeats: int = 9,
    compile: bool = True,
    out: Path = RESULTS,
) -> None:
    """Measure the towers.

    Args:
        architecture: open_clip architecture, with random weights and a folded adapter.
        batches: batch sizes.
        repeats: rounds; in each a candidate runs for at least 0.3 s.
        compile: measure torch.compile, which takes most of the time here.
        out: folder of the table.
    """
    report = Report(
        "towers",
        f"The towers of {architecture}",
        "From uint8 pixels or token ids to unit-length embeddings, fp32. ONNX Runtime runs the"
        " encoders that radapter-export writes; torch eager is open_clip's own code; torch.compile"
        " is that, compiled for the very shape. Short texts are 'a photo of a {}.' of CIFAR-100's"
        " names, cropped to the longest in the batch, for all three.",
    )
    with tempfile.TemporaryDirectory() as folder:
        base, encoders = folded_clip(architecture, Path(folder))
    towers = torch_towers(base)
    rows = []
    medians = {}
    worst = {EAGER: 0.0, COMPILE: 0.0}
    failure = ""
    for case, embed in towers.items():
        encoder = encoders["image_encoder" if case == IMAGE else "text_encoder"]
        for size in batches:
            array = batch_of(base, case, size)
            tensor = torch.from_numpy(array)
            error = float(np.abs(embed(tensor).numpy() - encoder(array)).max())
            assert error < 1e-4, f"{case}, batch {size}: ONNX Runtime and torch differ by {error}"
            candidates = {
                EAGER: clocked(partial(embed, tensor)),
                ONNX: clocked(partial(encoder, array)),
            }
            if compile and not failure:
                say(f"{case}, batch {size}: compiling")
                faster, failure = compiled(embed, tensor)
                if faster is not None:
                    candidates[COMPILE] = clocked(partial(faster, tensor))
            say(f"{case}, batch {size}: {repeats} rounds")
            times = alternate(candidates, repeats)
            cells = []
            for name in (EAGER, COMPILE, ONNX):
                if name not in times:
                    cells += ["-", "-"]
                    continue
                medians[case, size, name] = statistics.median(times[name])
                cells += [
                    f"{1e3 * medians[case, size, name]:.1f}",
                    f"{ratio(times[name], times[EAGER]):.2f}",
                ]
                if name != ONNX:
                    worst[name] = max(worst[name], ratio(times[ONNX], times[name]))
            shape = f", {array.shape[1]} tokens" if case == SHORT else ""
            rows.append([f"{case}{shape}", str(size), *cells[:1], *cells[2:]])
    columns = ["input", "batch", f"{EAGER} ms", f"{COMPILE} ms", "ratio", f"{ONNX} ms", "ratio "]
    report.table("A batch", columns, rows)
    report.note(f"Ratios are to {EAGER}.")
    if failure:
        report.note(f"torch.compile does not work here: {failure}")
    slowest = ", ".join(f"{value:.2f} of {name}" for name, value in worst.items() if value)
    report.note(f"Aim: ONNX Runtime never slower than either. Its largest ratio: {slowest}.")
    rows = [
        [
            name,
            *(f"{medians[LONG, size, name] / medians[SHORT, size, name]:.1f}" for size in batches),
        ]
        for name in (EAGER, COMPILE, ONNX)
        if (LONG, batches[-1], name) in medians
    ]
    report.table(
        "Texts of 77 tokens take so many times as long as short ones",
        ["", *map(str, batches)],
        rows,
    )
    report.note("Aim: short queries 5 times faster.")
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
