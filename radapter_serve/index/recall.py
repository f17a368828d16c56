"""How much effort an approximate search needs: the least that has the recall, on images and on
texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# a little more than is promised: it is measured on a sample
RECALL = 0.975
TOP_K = 10
_BLOCK = 10_000
# cells probed, and how many candidates are sorted by the vectors themselves
EFFORTS = (
    (8, 100),
    (16, 100),
    (32, 200),
    (32, 400),
    (64, 400),
    (64, 700),
    (128, 700),
    (192, 700),
    (256, 700),
    (256, 1500),
    (320, 1500),
    (384, 1500),
    (512, 2000),
    (1024, 4000),
    (4096, 10_000),
)
# Texts lie far from all images in CLIP's space, so their nearest images are spread over more cells.
_THINGS = (
    "a dog, a cat, a horse, a bird, a cow, a sheep, an elephant, a bear, a fish, an insect, a"
    " snake, a monkey, a child, a baby, a man, a woman, a crowd, a wedding, a dancer, a runner, a"
    " cyclist, a swimmer, a skier, a climber, a football match, a concert, a birthday party, a car,"
    " a truck, a bus, a train, a bicycle, a motorcycle, a boat, an aeroplane, a tractor, a bridge,"
    " a road, a street at night, a house, a church, a castle, a skyscraper, a kitchen, a bedroom, a"
    " bathroom, an office, a shop, a restaurant, a garden, a park, a beach, the sea, a river, a"
    " lake, a waterfall, a mountain, a desert, a forest, a field, snow, rain, a sunset, the night"
    " sky, clouds, a fire, a flower, a tree, grass, a leaf, a mushroom, fruit, an apple, a banana,"
    " vegetables, bread, a cake, a pizza, soup, coffee, wine, a table, a chair, a bed, a lamp, a"
    " book, a computer, a telephone, a clock, a camera, a guitar, a toy, a ball, a hat, shoes, a"
    " red dress, glasses, a flag, a sign, a painting"
)
TEXTS = [f"a photo of {thing}." for thing in _THINGS.split(", ")]


class Searched(Protocol):
    """What `tune` needs of `Neighbours`."""

    vectors: NDArray[np.float32]

    def nearest(
        self, query: NDArray[np.float32], top_k: int, nprobes: int, candidates: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Positions of the nearest vectors, and their cosines."""


def tune(
    neighbours: Searched,
    texts: NDArray[np.float32],
    queries: int = 100,
    efforts: Sequence[tuple[int, int]] = EFFORTS,
    block: int = _BLOCK,
) -> dict[str, float]:
    """The least effort with a recall@10 of 0.975 on images of the index and on texts, whichever is
    worse.

    A hit counts where its cosine reaches that of the tenth nearest of all: which of equal images is
    found is no matter.

    Args:
        neighbours: the vectors.
        texts: embeddings of TEXTS, float32 [N, D].
        queries: how many images are asked for; they don't count as their own answers.
        efforts: cells and candidates to try, the least first.
        block: how many vectors are compared with the queries at once.

    Returns:
        `nprobes`, `candidates` and `recall`.
    """
    chosen = np.random.default_rng(0).choice(len(neighbours.vectors), queries, replace=False)
    asked = np.concatenate([neighbours.vectors[np.sort(chosen)], texts])
    own = np.repeat([1, 0], [queries, len(texts)])
    best = _best_scores(neighbours.vectors, asked, block)
    tenth = np.where(own == 1, best[:, TOP_K], best[:, TOP_K - 1]) - 1e-5

    def measure(nprobes: int, candidates: int) -> float:
        found = np.zeros(len(asked))
        for row, vector in enumerate(asked):  # an image's first hit is itself
            _, scores = neighbours.nearest(vector, TOP_K + int(own[row]), nprobes, candidates)
            hits = scores[own[row] : own[row] + TOP_K]
            found[row] = (hits >= tenth[row]).sum() / TOP_K
        return min(float(found[own == kind].mean()) for kind in (0, 1))

    result = {}
    for nprobes, candidates in efforts:
        recall = measure(nprobes, candidates)
        result = {"nprobes": nprobes, "candidates": candidates, "recall": recall}
        if recall >= RECALL:
            return result
    return result


def _best_scores(
    vectors: NDArray[np.float32], asked: NDArray[np.float32], block: int
) -> NDArray[np.float32]:
    """The best cosines of each query, float32 [N, TOP_K + 1], by comparing all vectors in one
    pass.
    """
    best = np.zeros((len(asked), 0), np.float32)
    for start in range(0, len(vectors), block):
        scores = asked @ vectors[start : start + block].T
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, : TOP_K + 1]
    return best
