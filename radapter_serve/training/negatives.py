"""Classes that a batch lacks, as negatives of its images."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence

from radapter_serve.contract.labels import split_label
from radapter_serve.data import LabelledImages


def other_prompts(
    data: LabelledImages, present: Collection[int], count: int, draw: random.Random
) -> dict[int, str]:
    """Prompts of classes that no image of a batch has, by their numbers.

    A class that has the first name of one in the batch is left out: its prompt would be right.

    Args:
        data: has the classes and the templates.
        present: numbers of the classes that the batch has; others are ignored.
        count: of prompts, at most.
        draw: of the classes and of their templates.
    """
    names = [split_label(line)[0] for line in data.classes]
    taken = {names[label] for label in present if 0 <= label < len(names)}
    absent = [label for label, name in enumerate(names) if name not in taken]
    drawn = draw.sample(absent, min(count, len(absent)))
    return {label: data.prompt(label, draw) for label in drawn}


def share(texts: Sequence[str], process: int, processes: int) -> list[str]:
    """One process's part of texts, which is as long as that of any other.

    All parts in their order are the texts, and then the first text again where parts would be
    shorter.

    Args:
        texts: the same in all processes.
        process: from 0.
        processes: their number.
    """
    size = math.ceil(len(texts) / processes)
    missing = size * processes - len(texts)
    return [*texts, *(missing * list(texts[:1]))][size * process : size * (process + 1)]
