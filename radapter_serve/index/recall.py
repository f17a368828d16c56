"""How much effort an approximate search needs: the least that has the recall, on images and on texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.index.index import vectors_of

RECALL, TOP_K = 0.95, 10
# cells probed, and how many times the answers are sorted again by the vectors themselves
EFFORTS = ((16, 10), (32, 10), (64, 10), (128, 20), (256, 50), (1024, 100), (1024, 400))
# Texts lie far from all images in CLIP's space, so their nearest images are spread over more cells.
_THINGS = (
    "a dog, a cat, a horse, a bird, a cow, a sheep, an elephant, a bear, a fish, an insect, a snake, a monkey, a "
    "child, a baby, a man, a woman, a crowd, a wedding, a dancer, a runner, a cyclist, a swimmer, a skier, a climber, "
    "a football match, a concert, a birthday party, a car, a truck, a bus, a train, a bicycle, a motorcycle, a boat, "
    "an aeroplane, a tractor, a bridge, a road, a street at night, a house, a church, a castle, a skyscraper, a "
    "kitchen, a bedroom, a bathroom, an office, a shop, a restaurant, a garden, a park, a beach, the sea, a river, a "
    "lake, a waterfall, a mountain, a desert, a forest, a field, snow, rain, a sunset, the night sky, clouds, a fire, "
    "a flower, a tree, grass, a leaf, a mushroom, fruit, an apple, a banana, vegetables, bread, a cake, a pizza, "
    "soup, coffee, wine, a table, a chair, a bed, a lamp, a book, a computer, a telephone, a clock, a camera, a "
    "guitar, a toy, a ball, a hat, shoes, a red dress, glasses, a flag, a sign, a painting"
)
TEXTS = [f"a photo of {thing}." for thing in _THINGS.split(", ")]


def tune(table: Any, count: int, texts: NDArray[np.float32], queries: int = 100) -> dict[str, float]:
    """The least effort with a recall@10 of 0.95 on images of the index and on texts, whichever is worse.

    A hit counts where its cosine reaches that of the tenth nearest of all: which of equal images is found is no matter.

    Args:
        table: of LanceDB, with an index.
        count: rows of it.
        texts: embeddings of TEXTS, float32 [N, D].
        queries: how many images are asked for; they don't count as their own answers.

    Returns:
        `nprobes`, `refine_factor` and `recall`.
    """
    chosen = np.random.default_rng(0).choice(count, queries, replace=False)
    images = vectors_of(table.take_offsets(sorted(map(int, chosen))).select(["vector"]).to_arrow()["vector"])
    asked = np.concatenate([images, texts])
    own = np.repeat([1, 0], [len(images), len(texts)])
    best = _best_scores(table, asked)
    tenth = np.where(own == 1, best[:, TOP_K], best[:, TOP_K - 1]) - 1e-5

    def share(nprobes: int, refine: int) -> NDArray[np.float64]:
        """Recall of each query; an image's first hit is itself."""
        found = np.zeros(len(asked))
        for row, vector in enumerate(asked):
            query = table.search(vector).distance_type("dot").nprobes(nprobes).refine_factor(refine)
            answers = query.limit(TOP_K + int(own[row])).select(["_distance"]).to_arrow()["_distance"].to_numpy()
            found[row] = (1 - np.sort(answers)[own[row] :] >= tenth[row]).sum()
        return found / TOP_K

    for nprobes, refine in EFFORTS:
        shares = share(nprobes, refine)
        recall = min(float(shares[own == kind].mean()) for kind in (0, 1))
        if recall >= RECALL:
            break
    return {"nprobes": nprobes, "refine_factor": refine, "recall": recall}


def _best_scores(table: Any, asked: NDArray[np.float32]) -> NDArray[np.float32]:
    """The best cosines of each query, float32 [N, TOP_K + 1], by comparing all vectors in one pass over the table."""
    best = np.zeros((len(asked), 0), np.float32)
    for batch in table.search().select(["vector"]).to_batches():
        best = np.concatenate([best, asked @ vectors_of(batch["vector"]).T], axis=1)
        best = -np.sort(-best, axis=1)[:, : TOP_K + 1]
    return best
