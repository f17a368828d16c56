"""Batches of training, in an order that a seed fixes: a run can be cut and go on, or spread over
processes.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from radapter_serve.data.captions import Captioned
from radapter_serve.data.rows import BrokenImage, LabelledImages
from radapter_serve.errors import RAdapterError, reason

Transform = Callable[[Image.Image], Tensor]
NO_LABEL = -1  # in the place of labels that an image does not have


@dataclass
class Examples(Dataset[dict[str, Any]]):
    """Items of a training batch: pixels, the label, the text; each depends on (seed, epoch, index)
    alone. `transform` augments to float [3, S, S]; `refuse` stops at a broken image rather than
    take the next one.
    """

    data: LabelledImages | Captioned
    transform: Transform
    seed: int
    epoch: int = 0
    refuse: bool = True

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        broken: list[str] = []
        for offset in range(len(self)):
            try:
                item = self.item(self.data.rows[(index + offset) % len(self)], index)
            except BrokenImage as error:
                broken.append(str(error))
                if self.refuse:
                    break
            except RAdapterError as error:
                return {"error": str(error)}
            else:
                return {**item, "broken": broken, "row": 0}
        return {"error": _refusal(broken[-1], self.refuse)}

    def item(self, row: Any, index: int) -> dict[str, Any]:
        """One row, augmented by the draw that belongs to its index."""
        draw = random.Random(f"{self.seed}-{self.epoch}-{index}")
        augmentation = draw.getrandbits(63)
        image, labels, text = self.data.pair(row, draw)
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` writes a stack trace for each GPU.
            torch.default_generator.manual_seed(augmentation)
            pixels = self.transform(image)
        return {
            "pixels": pixels,
            "labels": labels if isinstance(labels, tuple) else (labels,),
            "texts": [text] if isinstance(text, str) else text,
        }


class _Stream(IterableDataset[dict[str, Any]]):
    """The same items from a stream: shuffled in a buffer, divided among processes, without the
    first `skip` rows.
    """

    def __init__(self, examples: Examples, rank: int, world: int, skip: int) -> None:
        rows = examples.data.rows.shuffle(seed=examples.seed + examples.epoch, buffer_size=1000)
        self.rows = split_dataset_by_node(rows, rank, world).skip(skip)
        self.examples = examples
        self.first = skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        broken: list[str] = []
        rows = iter(self.rows)
        index = self.first - 1
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of many kinds: a torn file, a lost connection
                yield {"error": f"the stream broke off: {reason(error)}"}
                return
            index += 1
            try:
                item = self.examples.item(row, index)
            except BrokenImage as error:
                broken.append(str(error))
                if self.examples.refuse:
                    yield {"error": _refusal(str(error), refuse=True)}
            except RAdapterError as error:
                yield {"error": str(error)}
            else:
                yield {**item, "broken": broken, "row": index + 1}
                broken = []


def _refusal(broken: str, refuse: bool) -> str:
    if refuse:
        return f"{broken}; mend it, or leave such images out with --on-broken skip"
    return f"not one image of the data set can be read; the last: {broken}"


def batches(
    examples: Examples,
    batch_size: int,
    *,
    epoch: int,
    start: int,
    rank: int,
    world: int,
    workers: int,
) -> DataLoader[dict[str, Any]]:
    """One epoch's batches of process `rank` of `world`, without a last, smaller one, and without
    the first `start` batches (of a stream, rows), which were seen before a restart.
    """
    examples.epoch = epoch
    common: dict[str, Any] = {
        "collate_fn": _collate,
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": ignore_interruptions,
        "generator": torch.Generator(),  # the default one is that of a step's draws
    }
    if isinstance(examples.data.rows, datasets.IterableDataset):
        common["num_workers"] = min(workers, 1)  # one reader keeps the order
        stream = _Stream(examples, rank, world, start)
        return DataLoader(stream, batch_size=batch_size, drop_last=True, **common)
    generator = torch.Generator().manual_seed(examples.seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(examples), generator=generator)
    even = len(shuffled) // world * world  # equal shares, or processes would drift apart
    order = shuffled[:even][rank::world].tolist()
    starts = range(0, len(order) - batch_size + 1, batch_size)
    chunks = [order[i : i + batch_size] for i in starts[start:]]
    return DataLoader(examples, batch_sampler=chunks, **common)  # type: ignore[arg-type]


def endless(
    examples: Examples,
    batch_size: int,
    *,
    position: tuple[int, int] = (0, 0),
    rank: int = 0,
    world: int = 1,
    workers: int,
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """The batches of all epochs from an (epoch, batch or row) on, each with that which comes after
    it.
    """
    epoch, start = position
    while True:
        offset = start
        loader = batches(
            examples,
            batch_size,
            epoch=epoch,
            start=start,
            rank=rank,
            world=world,
            workers=workers,
        )
        for offset, batch in enumerate(loader, start + 1):
            if "error" in batch:
                raise RAdapterError(batch["error"])
            yield (epoch, batch["row"] or offset), batch  # a stream continues after its last row
        if offset == start == 0:
            raise RAdapterError(
                f"the data set has fewer images that can be read than a batch of {batch_size}"
            )
        epoch += 1
        start = 0


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    # a worker's exception would reach the user as its traceback, so errors travel as items
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
        "row": items[-1]["row"],
    }


def ignore_interruptions(worker: int) -> None:
    """For processes that read images: the terminal sends Ctrl-C to them, too, and the run still
    needs them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
