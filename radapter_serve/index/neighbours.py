"""Nearest vectors of a big index: FAISS finds candidates with short codes in memory, and exact
cosines with the mapped vectors sort them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled, check_cancelled
from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.files import ascii_path
from radapter_serve.index.conditions import Met
from radapter_serve.index.facts import NearestFacts
from radapter_serve.process import total

CODES = "codes.faiss"
Positions = NDArray[np.int64]
_MOST_CELLS = 65_536
_SAMPLE = 32  # training vectors for each cell's centre
_ROUNDS = 10  # of k-means; more change little
_CANDIDATES = 8  # least number for each hit
_SEEN = 25  # least number of vectors in the searched cells, for each hit
# Exponent with which the effort grows with the number of hits. Ten hits among a tenth of all
# vectors are as far away as a hundred among all.
_DEPTH = 0.3
_DEVIATIONS = 4  # standard deviations of the codes' errors within which a search looks
_ROUNDING = 1e-5  # of a cosine in float32
_BLOCK = 10_000  # vectors processed at once
_QUERIES = 100  # images of the index for tuning the effort

RECALL = 0.98  # on the sample; other queries get somewhat less, and 0.975 is promised
TOP_K = 10
# Cells and candidates to try in tuning, in order of effort.
EFFORTS = (
    *((8, 100), (16, 100), (32, 200), (32, 400), (48, 400), (64, 400), (80, 500), (96, 600)),
    *((128, 700), (192, 700), (256, 700), (256, 1500), (320, 1500), (384, 1500), (512, 2000)),
    *((1024, 4000), (4096, 10_000)),
)

# Texts are far from all images in CLIP's space, so their nearest images are in more cells.
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


class Neighbours:
    """The vectors of an index and their codes; any number of queries can run at once."""

    def __init__(self, folder: Path, vectors: NDArray[np.float32]) -> None:
        self._faiss = load_faiss()
        self.vectors = vectors
        try:
            self._index = self._faiss.read_index(str(ascii_path(folder) / CODES))
        except RuntimeError as error:
            raise RAdapterError(f"{folder} can't be read: {reason(error):.300}") from None
        count, dim = vectors.shape
        fits = (
            isinstance(self._index, self._faiss.IndexIVFPQFastScan)
            and (self._index.ntotal, self._index.d) == (count, dim)
            and self._index.metric_type == self._faiss.METRIC_INNER_PRODUCT
            and self._index.invlists.compute_ntotal() == count
        )
        if not fits:
            raise RAdapterError(
                f"{folder} does not hold the codes of {count} vectors of width {dim} that"
                " index.json names"
            )
        self.cells = int(self._index.nlist)
        # Cell of each vector
        lists = self._index.invlists
        self._cell_of = np.zeros(count, np.int32)
        for cell in range(self.cells):
            ids = self._faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))
            self._cell_of[ids] = cell
        self._sizes = np.bincount(self._cell_of, minlength=self.cells)

    def nearest(
        self,
        query: NDArray[np.float32],
        top_k: int,
        nprobes: int,
        candidates: int,
        among: Met | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[Positions, NDArray[np.float32]]:
        """Find the nearest vectors and their cosines, best first; more than `top_k` if rounding
        could change the last. `nprobes` and `candidates` are the effort for ten among all.
        """
        faiss = self._faiss
        faiss.omp_set_num_threads(1)  # applies to the calling thread
        asked = np.ascontiguousarray(query[None], np.float32)
        total = len(self.vectors)
        count = total if among is None else among.count
        share = count / total

        # Choose the number of cells so that they hold `seen` of the allowed vectors.
        tens = max(top_k / 10, 1)
        seen = nprobes / self.cells * count * (tens / share) ** _DEPTH
        seen = max(seen, _SEEN * top_k)
        probes = min(self.cells, round(seen / count * self.cells))
        correlated = False
        selector = None
        if among is not None:
            selector = faiss.IDSelectorBitmap(total, faiss.swig_ptr(among.bits))
            probes, correlated = self._cells_among(among, asked, seen, nprobes // 4)
        options = faiss.SearchParametersIVF(nprobe=probes, sel=selector)

        # Let FAISS name candidates, and sort them exactly; ask for more until the best are certain.
        wanted = min(count, max(round(candidates * (tens * share) ** _DEPTH), _CANDIDATES * top_k))
        while True:
            check_cancelled(cancelled)
            codes, named = self._index.search(asked, wanted, params=options)
            there = (named[0] >= 0) & (named[0] < total)
            positions = named[0][there]
            approximate = codes[0][there]
            scores = self.cosines(query, positions)
            best = near_best(scores, top_k)
            if len(positions) < wanted or wanted == count:
                break
            lowest = approximate.min()
            if correlated:
                # Stop if no vector beyond the candidates can be a hit, according to the codes'
                # errors so far.
                errors = scores - approximate
                if lowest + _DEVIATIONS * errors.std() < scores[best].min():
                    break
                if 4 * wanted >= count and among is not None:
                    positions = among.positions
                    scores = self.cosines(query, positions)
                    best = near_best(scores, top_k)
                    break
            elif lowest < approximate[best].min():  # else equals of the last hit may be missing
                break
            wanted = min(count, 4 * wanted)
        order = np.argsort(-scores[best], kind="stable")
        return positions[best][order], scores[best][order]

    def _cells_among(
        self, among: Met, asked: NDArray[np.float32], seen: float, least: int
    ) -> tuple[int, bool]:
        """Number of cells that hold `seen` vectors of those that meet a condition, and True if the
        condition excludes the vectors near the query: the rest may be anywhere, in all cells.
        """
        share = among.count / len(self.vectors)
        _, order = self._index.quantizer.search(asked, self.cells)
        rows = np.cumsum(self._sizes[order[0]])
        met = np.cumsum(among.in_cells(self._cell_of, self.cells)[order[0]])
        near = max(least, int(np.searchsorted(rows, _SEEN / share)))
        near = min(near, self.cells - 1)
        expected = share * rows[near]
        deviation = (expected * (1 - share)) ** 0.5
        if met[near] < expected - _DEVIATIONS * deviation:
            return self.cells, True
        return min(self.cells, int(np.searchsorted(met, seen)) + 1), False

    def cosines(self, query: NDArray[np.float32], of: Positions) -> NDArray[np.float32]:
        """Compute cosines with some vectors in FAISS, which does not copy them."""
        scores = np.empty(len(of), np.float32)
        places = np.ascontiguousarray(of, np.int64)
        asked = np.ascontiguousarray(query, np.float32)
        self._faiss.omp_set_num_threads(1)  # applies to the calling thread
        self._faiss.fvec_inner_products_by_idx(
            self._faiss.swig_ptr(scores),
            self._faiss.swig_ptr(asked),
            self._faiss.swig_ptr(self.vectors),
            self._faiss.swig_ptr(places),
            *(self.vectors.shape[1], 1, len(places)),
        )
        return scores


def near_best(scores: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    """Mark the `top_k` best scores, and those that equal the last within rounding."""
    if len(scores) <= top_k:
        return np.ones(len(scores), bool)
    return np.asarray(~(scores < np.partition(scores, -top_k)[-top_k] - _ROUNDING))


def write_neighbours(
    folder: Path,
    vectors: NDArray[np.float32],
    embed_texts: Callable[[list[str]], NDArray[np.float32]],
) -> NearestFacts:
    """Write the codes of vectors, [N, D], and tune the effort of a search with the text encoder."""
    faiss = load_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or total()))
    count, dim = vectors.shape
    try:
        # Train the codes on a sample, and add all vectors.
        cells = max(1, min(_MOST_CELLS, int(2 * count**0.5), count // _SAMPLE))
        parts = dim // 2 if dim % 2 == 0 else dim
        index = faiss.index_factory(dim, f"IVF{cells},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = _ROUNDS
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = _SAMPLE
        index.pq.cp.min_points_per_centroid = 1
        size = min(count, max(_SAMPLE * cells, 16_384))
        sample = np.random.default_rng(0).choice(count, size, replace=False)
        index.train(vectors[np.sort(sample)])
        for start in range(0, count, _BLOCK):
            index.add(np.ascontiguousarray(vectors[start : start + _BLOCK]))
        faiss.write_index(index, str(folder / CODES))
    except RuntimeError as error:  # raised by FAISS
        raise RAdapterError(f"cannot write {folder}: {reason(error):.300}") from None
    finally:
        faiss.omp_set_num_threads(threads)
    effort = tune(Neighbours(folder, vectors), embed_texts(TEXTS))
    return NearestFacts(int(index.nlist), *effort)


def tune(neighbours: Neighbours, texts: NDArray[np.float32]) -> tuple[int, int, float]:
    """Find the least effort with the recall@10 `RECALL` for images of the index and for texts:
    cells, candidates, and the recall.
    """
    vectors = neighbours.vectors
    chosen = np.random.default_rng(0).choice(len(vectors), _QUERIES, replace=False)
    asked = np.concatenate([vectors[np.sort(chosen)], texts])
    itself = np.repeat([1, 0], [_QUERIES, len(texts)])  # an image's first hit is the image

    # Cosine of each query's tenth nearest vector, by comparing all vectors
    nearest = np.zeros((len(asked), 0), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        scores = asked @ vectors[start : start + _BLOCK].T
        nearest = -np.sort(-np.concatenate([nearest, scores], axis=1), axis=1)[:, : TOP_K + 1]
    tenth = np.where(itself == 1, nearest[:, TOP_K], nearest[:, TOP_K - 1]) - _ROUNDING

    # Try efforts until one reaches the recall.
    for nprobes, candidates in EFFORTS:
        hits = np.zeros(len(asked))
        for row, vector in enumerate(asked):
            _, scores = neighbours.nearest(vector, TOP_K + int(itself[row]), nprobes, candidates)
            best = scores[itself[row] : itself[row] + TOP_K]
            hits[row] = (best >= tenth[row]).sum() / TOP_K
        recall = min(float(hits[itself == kind].mean()) for kind in (0, 1))
        if recall >= RECALL:
            break
    return nprobes, candidates, recall


def load_faiss() -> Any:
    """Import FAISS, which only indexes of many images need."""
    check_installed("faiss", "server")
    import faiss

    return faiss
