"""Training batches in an order that a seed fixes, so that a run can be resumed, or spread over
processes.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from radapter_serve.data.captions import Captioned
from radapter_serve.data.rows import BrokenImage, LabelledImages
from radapter_serve.errors import RAdapterError

Transform = Callable[[Image.Image], Tensor]
Position = tuple[int, int]  # epoch, and batch in it
NO_LABEL = -1  # pads the labels of an image that has fewer than others


@dataclass
class Examples(Dataset[dict[str, Any]]):
    """Items of a training batch by (epoch, index); each depends only on these and the seed.
    `refuse` makes a broken image an error, rather than take the next image.
    """

    data: LabelledImages | Captioned
    transform: Transform
    seed: int
    refuse: bool = True

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        draw = random.Random(f"{self.seed}-{epoch}-{index}")
        augmentation = draw.getrandbits(63)
        broken: list[str] = []
        for offset in range(len(self)):
            try:
                row = self.data.rows[(index + offset) % len(self)]
                image, labels, text = self.data.pair(row, draw)
            except BrokenImage as error:
                broken.append(str(error))
                if self.refuse:
                    break
            except RAdapterError as error:
                return {"error": str(error)}
            else:
                with torch.random.fork_rng(devices=[]):
                    # Not with `torch.manual_seed`, which formats a stack trace for each GPU.
                    torch.default_generator.manual_seed(augmentation)
                    pixels = self.transform(image)
                return {
                    "pixels": pixels,
                    "labels": labels if isinstance(labels, tuple) else (labels,),
                    "texts": [text] if isinstance(text, str) else text,
                    "broken": broken,
                }
        if self.refuse:
            advice = "mend it, or leave such images out with --on-broken skip"
            return {"error": f"{broken[-1]}; {advice}"}
        return {"error": f"not one image of the data set can be read; the last: {broken[-1]}"}


def endless(
    examples: Examples,
    batch_size: int,
    *,
    position: Position = (0, 0),
    rank: int = 0,
    world: int = 1,
    workers: int,
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Yield a process's batches over all epochs, each with the position that comes next."""
    share = len(examples) // world  # equal shares keep the processes in step
    if share < batch_size:
        raise RAdapterError(
            f"the data set has fewer images that can be read than a batch of {batch_size}"
        )

    def order() -> Iterator[tuple[Position, list[tuple[int, int]]]]:
        """Positions, and the items of their batches."""
        epoch, start = position
        while True:
            generator = torch.Generator().manual_seed(examples.seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(examples), generator=generator).tolist()
            items = [(epoch, index) for index in shuffled[: share * world][rank::world]]
            for number in range(start, share // batch_size):
                first = number * batch_size
                yield (epoch, number + 1), items[first : first + batch_size]
            epoch += 1
            start = 0

    # One loader for all epochs: a worker is forked once, and each fork of a process that trains
    # makes its next step copy the memory that it writes.
    loader: DataLoader[dict[str, Any]] = DataLoader(
        examples,
        batch_sampler=(items for _, items in order()),  # type: ignore[arg-type]
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_interruptions,
        generator=torch.Generator(),  # the default generator is for the draws of a step
    )
    for (place, _), batch in zip(order(), loader, strict=False):
        if "error" in batch:
            raise RAdapterError(batch["error"])
        yield place, batch


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    # Errors travel as items: a worker's exception would reach the user with its traceback.
    errors = [item["error"] for item in items if "error" in item]
    if errors:
        return {"error": errors[0]}
    of_images = [torch.tensor(item["labels"]) for item in items]
    return {
        "pixels": torch.stack([item["pixels"] for item in items]),
        "labels": torch.stack([labels[0] for labels in of_images]),  # of the texts
        "of_images": pad_sequence(of_images, batch_first=True, padding_value=NO_LABEL),
        "texts": [text for item in items for text in item["texts"]],
        "broken": [name for item in items for name in item["broken"]],
    }


def ignore_interruptions(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a process that reads images, which the run still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
