"""Label sets with their text embeddings, and the stored prompts of a label set."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.labels import split_label
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text, digest_of, map_array, read_arrays, staged

MAX_EXAMPLES = 128  # of a request, and of a label set that is embedded again
_TEXTS = ("labels", "lines", "templates")  # texts of a label set
_FORM = "rows"  # of the examples in a file: see radapter_serve/contract/rows.py
# End of the files in which an export stores the embeddings of a label set's prompts, for adapters
# to map; and their largest size: 80,000 prompts of width 768 have 246 MB.
PROMPTS = ".prompts.npy"
MAX_PROMPTS_BYTES = 256 << 20


@dataclass(frozen=True)
class Examples:
    """Image files that are examples of some labels of a list."""

    images: tuple[bytes, ...]
    labels: tuple[int, ...]  # for each example, the index of its label in the list
    # Of a label's examples, in [0, 1]: one weight for all labels, or one for each; None has them
    # chosen with the examples.
    weights: tuple[float, ...] | None = None
    # True for a file of version 1.0.0, which mixes the mean of the examples itself into the text
    of_means: bool = False

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each image."""
        return tuple(hashlib.sha256(image).digest() for image in self.images)


@dataclass(frozen=True)
class LabelSet:
    """Classes with their embeddings, and the texts and examples from which these are computed."""

    labels: tuple[str, ...]  # names to show, C of them
    embeds: NDArray[np.float32]  # [C, D], unit length, moved by the examples
    lines: tuple[str, ...]  # the labels with their synonyms
    templates: tuple[str, ...]
    examples: Examples | None = None  # that have moved `embeds`

    def save(self, path: str | Path) -> None:
        """Write the label set as npz, atomically."""
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, name), dtype=np.str_) for name in _TEXTS
        }
        if self.examples is not None:
            arrays |= {
                "examples": np.frombuffer(b"".join(self.examples.images), np.uint8),
                "example_sizes": np.array([len(image) for image in self.examples.images]),
                "example_labels": np.array(self.examples.labels),
                "example_weights": np.array(self.examples.weights or (), np.float64),
                "example_form": np.array(_FORM),
            }
        with staged(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, embeds=np.asarray(self.embeds, np.float32), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Read a file of `save`; refuses more than `MAX_EXAMPLES` examples."""
        arrays = read_arrays(Path(path))
        values: dict[str, Any] = {name: tuple(arrays[name].tolist()) for name in _TEXTS}
        embeds = np.ascontiguousarray(arrays["embeds"], np.float32)
        if "examples" not in arrays:
            return cls(embeds=embeds, **values)
        sizes = arrays["example_sizes"]
        if sizes.size > MAX_EXAMPLES:
            raise RAdapterError(
                f"{path} has {sizes.size} examples; at most {MAX_EXAMPLES} are allowed; export"
                " it again with radapter-export"
            )
        whole = arrays["examples"].tobytes()
        ends = np.cumsum(sizes).tolist()
        images = tuple(whole[start:end] for start, end in itertools.pairwise([0, *ends]))
        labels = tuple(arrays["example_labels"].tolist())
        weights = tuple(arrays["example_weights"].tolist()) or None
        of_means = "example_form" not in arrays
        examples = Examples(images, labels, weights, of_means)
        return cls(embeds=embeds, **values, examples=examples)


def load_label_sets(folder: Path) -> dict[str, LabelSet]:
    """Load all `NAME.npz` of a folder by name; empty if the folder does not exist."""
    return {as_text(path.stem): LabelSet.load(path) for path in sorted(folder.glob("*.npz"))}


def prompt_counts(lines: Sequence[str], templates: Sequence[str]) -> list[int]:
    """How many prompts each label has: its names in each template."""
    return [len(split_label(line)) * len(templates) for line in lines]


def load_prompts(path: Path, label_set: LabelSet, digest: str) -> NDArray[np.float32] | None:
    """Map the stored prompts of a label set from the disk, label by label and for each of its names
    the templates; None if the file is damaged: then its prompts are encoded.
    """
    try:
        if digest_of(path) != digest:
            raise ValueError("it differs from its digest")
        embeds: NDArray[np.float32] = map_array(path)
        count = sum(prompt_counts(label_set.lines, label_set.templates))
        shape = count, label_set.embeds.shape[1]
        if embeds.shape != shape or embeds.dtype != np.float32:
            raise ValueError(f"it has {embeds.dtype} {embeds.shape}, not float32 {shape}")
    except (OSError, ValueError) as error:
        print(f"{path} is damaged, so its prompts are encoded: {error}", file=sys.stderr)
        return None
    return embeds
