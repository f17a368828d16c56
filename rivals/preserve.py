"""`python -m rivals.preserve`: on what the base is kept: the images of a batch, as `preserve` does,
images mixed from two of them, their similarities to random texts, or other images.
"""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.nn.utils import parametrize

from radapter_serve.adapter import Adapters
from radapter_serve.cli import run as run_command
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_text, text_tower
from radapter_serve.contract.image_files import list_images
from radapter_serve.contract.preprocess import decode
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.training import Recipe, Run
from radapter_serve.training.loss import gather_with_grad
from radapter_serve.training.step import at_base, distance_of_images
from rivals import loop
from rivals.beyond import groups
from rivals.cells import Cells
from rivals.choice import CHOICES, choose
from rivals.flags import Flags, check_seeds
from rivals.layout import T95, markdown, paired_leads, spread
from rivals.make import command_line, machine, publish, say
from rivals.method import Method
from rivals.radapter import RAdapter
from rivals.tables import TABLES

PARTS = 4  # of a mixed image, across and down
TEXTS = 80
TOKENS = 8  # of a text


def distance_of_mixed(
    base: Base, adapters: Adapters, accelerator: Accelerator, pixels: Tensor, _: Tensor
) -> Tensor:
    """As `distance_of_images`, on images each of whose parts is, by an even chance, that of another
    image drawn from the batch.
    """
    chance = torch.rand(len(pixels), 1, PARTS, PARTS)
    own = F.interpolate(chance, size=pixels.shape[2:]).to(pixels.device) < 0.5
    mixed = torch.where(own, pixels, pixels[torch.randperm(len(pixels))])
    return _distance(base, adapters, accelerator, mixed)


def distance_of_similarities(
    base: Base, adapters: Adapters, accelerator: Accelerator, pixels: Tensor, image_embeds: Tensor
) -> Tensor:
    """The mean squared change of an image's similarities to texts of random tokens, as the base
    embeds these (Nam et al., Lipsum-FT, ICLR 2024, of which the numbers are).
    """
    with at_base(adapters, accelerator):
        texts = encode_text(base.model, random_tokens(base).to(pixels.device))
        base_embeds: Tensor = accelerator.gather(encode_image(base.model, pixels))
    moved = image_embeds.float() - base_embeds.float()
    return (moved @ texts.float().T).square().mean()


def random_tokens(base: Base) -> Tensor:
    """Texts that mean nothing, the same in every step, integer [80, context length].

    The demo's base has learned a fifth of the tokens, and the others are zero, so they are left
    out.
    """
    start, _, end = base.tokenizer(["a"])[0, :3].tolist()
    embedding: Any = text_tower(base.model).token_embedding
    known = embedding.weight.detach().cpu().abs().sum(dim=1).nonzero().flatten()
    known = known[~torch.isin(known, torch.tensor([start, end]))]
    drawn = torch.randint(len(known), (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros_like(base.tokenizer(["a"] * TEXTS))
    tokens[:, 0] = start
    tokens[:, 1 : TOKENS + 1] = known[drawn]
    tokens[:, TOKENS + 1] = end
    return tokens


def distance_of_others(
    folder: Path,
    base: Base,
    adapters: Adapters,
    accelerator: Accelerator,
    pixels: Tensor,
    _: Tensor,
) -> Tensor:
    """As `distance_of_images`, on as many images of a folder, drawn anew in each step."""
    paths = _images(folder)
    drawn = torch.randint(len(paths), (len(pixels),)).tolist()
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    others = torch.stack([transform(decode(paths[number].read_bytes())) for number in drawn])
    return _distance(base, adapters, accelerator, others.to(pixels.device))


def _distance(base: Base, adapters: Adapters, accelerator: Accelerator, pixels: Tensor) -> Tensor:
    """`distance_of_images`, on pixels that the step has not embedded yet."""
    with accelerator.autocast(), parametrize.cached():
        image_embeds = gather_with_grad(encode_image(base.model, pixels))
    return distance_of_images(base, adapters, accelerator, pixels, image_embeds)


@functools.cache
def _images(folder: Path) -> list[Path]:
    found = list_images(folder).images
    if not found:
        raise RAdapterError(f"--unlabelled: {folder} holds no images; name a folder that does")
    return found


@dataclass(frozen=True)
class Preserving(RAdapter):
    """R-Adapter whose `preserve` weighs another distance.

    Attributes:
        of: what should stay where the base has it.
        folder: of other images, whose labels nobody knows.
        images: digest of their names.
    """

    of: Literal["mixed", "texts", "others"] = "texts"
    folder: Path | None = field(default=None, repr=False)
    images: str = ""

    def train(self, recipe: Recipe) -> Run:
        distance: loop.Distance = distance_of_similarities
        if self.of == "mixed":
            distance = distance_of_mixed
        if self.of == "others":
            assert self.folder is not None
            distance = functools.partial(distance_of_others, self.folder)
        return loop.train(recipe, self.variant, distance=distance)


def ways(folder: Path) -> dict[str, list[Method]]:
    """What is kept, and R-Adapter with each weight of it, all without dropping.

    Args:
        folder: of other images.
    """

    rows = TABLES["main"].rows
    own = rows["R-Adapter, preserve"]
    names = b"\n".join(str(path.relative_to(folder)).encode() for path in _images(folder))
    others = Preserving(own.settings, of="others", folder=folder, images=digest_of(names))
    # The square of a difference of cosines is far below 1 − cosine, so its weights are larger.
    return {
        "nothing": [rows["R-Adapter, no dropping"]],
        "images of the batch": [own],
        "images mixed from two of the batch": [Preserving(own.settings, of="mixed")],
        "similarities to random texts": [
            Preserving({**own.settings, "preserve": weight}, of="texts")
            for weight in (300.0, 3000.0)
        ],
        "other images": [others],
    }


HEAD = [
    *("what is kept", "weight", "α", "validation", "in distribution", "shifts"),
    *("lead, validation", "lead, in distribution", "lead, shifts", "time, s"),
]


def compare(
    cells: Cells, methods: Mapping[str, Sequence[Method]], seeds: Sequence[int], rate: float
) -> str:
    """A row a way, as Markdown; validation chooses its weight and its α.

    Args:
        cells: of the benchmark.
        methods: by way, the first of which keeps nothing.
        seeds: each learns once for each.
        rate: factor of the learning rate.
    """
    first: list[tuple[float, float, float]] = []
    lines = []
    for name, weighed in methods.items():
        choice = choose(cells, name, weighed, seeds, [rate], CHOICES)
        method = choice.method
        validation = next(one.scores for one in choice.tried if one.method == method)
        tested = [cells.cell(name, method, seed, [method.alpha or 1.0]) for seed in seeds]
        found = []
        for score, cell in zip(validation, tested, strict=True):
            of_tests = groups(cell.rows)
            found.append((score, of_tests["in distribution"], of_tests["mean of the shifts"]))
        first = first or found
        lines.append(
            [
                name,
                f"{method.settings.get('preserve', 0.0):g}",
                f"{method.alpha:g}",
                *(spread(column) for column in zip(*found, strict=True)),
                *(paired_leads(found, first) if found is not first else [""] * 3),
                f"{median(cell.cost.seconds for cell in tested):.0f}",
            ]
        )
    return markdown(HEAD, lines)


def preserve(
    flags: tyro.conf.OmitArgPrefixes[Flags],
    unlabelled: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    rate: float = 1.0,
) -> None:
    """Compare what of the base R-Adapter may keep, its weight and its α chosen by validation; print
    it, write Markdown.

    Args:
        flags: as of rivals.table; its finished runs count.
        unlabelled: folder of other images, whose labels nobody knows.
        seeds: each way learns once for each; 10 at most.
        rate: factor of R-Adapter's learning rate, for all ways.
    """
    check_seeds(seeds, len(T95) + 1)
    benchmark = flags.benchmark()
    methods = ways(unlabelled)
    shown = compare(Cells(benchmark, flags.out, "preserve", flags.limit, say), methods, seeds, rate)
    sets = ", ".join(entry.name for entry in benchmark.suite.of_split("validation"))
    parts = [
        "# What of the base to keep",
        f"`{command_line('rivals.preserve')}`, {datetime.date.today()}, {machine()}.\n"
        f"Benchmark {benchmark.name}: R-Adapter without dropping, at {rate:g} times its rate."
        f" Accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}.\n"
        f"Validation, which is {sets}, chose α, and of the similarities the weight, 300 or 3000."
        " Its score is the mean of the two means, in distribution and shifted. A lead is over the"
        " first row, paired over the seeds, ± its 95 % interval. Times include reading the other"
        " images; finished runs keep the time that they had.",
        shown,
    ]
    publish(parts, flags.out / "preserve.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(preserve, argv, prog="python -m rivals.preserve")


if __name__ == "__main__":
    sys.exit(main())
