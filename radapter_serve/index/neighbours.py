"""Which vectors of a big index are nearest: FAISS names candidates by short codes in memory, and
the vectors themselves, which are mapped, sort them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.files import ascii_path
from radapter_serve.index.facts import NearestFacts
from radapter_serve.index.mapped import Positions
from radapter_serve.index.met import Met
from radapter_serve.threads import total

KIND = "IVF-PQ"
CODES = "codes.faiss"
_MOST_CELLS = 65_536
_SAMPLE = 32  # vectors that a cell's centre is computed from
_ROUNDS = 10  # of k-means; more change little
_CANDIDATES = 8  # for each hit at least
# The power of the number of hits, in tens, by which a search for more takes more: ten hits among a
# tenth of all vectors lie as far away as a hundred among all.
_MORE = 0.3
_SEEN = 25  # vectors for a hit, of those that may be found, that the cells hold at least
_FACTOR = 4  # how much more is searched where it was too little
_DEVIATIONS = 4  # of the errors of codes, beyond which no vector is looked for
_ROUNDING = 1e-5  # of a cosine in float32
_BLOCK = 10_000  # vectors at a time


class Neighbours:
    """The vectors of an index, to be searched; one thread a search, and any number of searches at
    once.

    Args:
        folder: of the codes.
        vectors: float32 [N, D], unit length, mapped.

    Raises:
        RAdapterError: the codes can't be read, or are of other vectors.
    """

    def __init__(self, folder: Path, vectors: NDArray[np.float32]) -> None:
        self._faiss = load_faiss()
        self.vectors = vectors
        try:
            self._index = self._faiss.read_index(str(ascii_path(folder) / CODES))
        except RuntimeError as error:
            raise RAdapterError(f"{folder} can't be read: {reason(error):.300}") from None
        count, dim = vectors.shape
        if not _fits(self._index, self._faiss, count, dim):
            raise RAdapterError(
                f"{folder} does not hold the codes of {count} vectors of width {dim} that"
                " index.json names"
            )
        self.cells = int(self._index.nlist)
        lists = self._index.invlists
        self._in_cell = [
            self._faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))
            for cell in range(self.cells)
        ]

    def nearest(
        self,
        query: NDArray[np.float32],
        top_k: int,
        nprobes: int,
        candidates: int,
        among: Met | None = None,
    ) -> tuple[Positions, NDArray[np.float32]]:
        """The nearest vectors and their cosines, best first, as `best` has them.

        The ten nearest of a tenth of all vectors are among some hundred nearest of all: they lie in
        more cells, and fewer others are named before them.

        Args:
            query: float32 [D], unit length.
            top_k: how many, 1 to the number of vectors that may be found.
            nprobes: cells that are searched for ten; more are for more.
            candidates: how many FAISS names for ten, which the vectors themselves sort.
            among: the vectors that may be found, drawn as if by lot; None for all.
        """
        count = len(self.vectors) if among is None else among.count
        share = count / len(self.vectors)
        tens = max(1.0, top_k / 10)
        wanted = round(candidates * (tens * share) ** _MORE)
        wanted = min(count, max(wanted, _CANDIDATES * top_k))
        seen = _SEEN * top_k * self.cells / count
        probes = min(self.cells, round(max(nprobes * (tens / share) ** _MORE, seen)))
        while True:
            named, approximate = self._named(query, wanted, probes, among)
            if len(named) < top_k and probes < self.cells:
                probes = min(self.cells, _FACTOR * probes)
                continue
            scores = self._cosines(query, named)
            near = _near(scores, top_k)
            # Where a hit is the last that FAISS named, its equals may be left out.
            tied = approximate[near].min() <= approximate.min()
            if not tied or len(named) < wanted or wanted == count:
                return _in_order(named[near], scores[near])
            wanted = min(count, _FACTOR * wanted)

    def nearest_of(
        self,
        query: NDArray[np.float32],
        top_k: int,
        nprobes: int,
        candidates: int,
        among: Met,
    ) -> tuple[Positions, NDArray[np.float32]]:
        """The nearest of some vectors and their cosines, best first, as `best` has them.

        Where a condition takes away what is near the query, the rest may lie anywhere, also where
        vectors are dense and codes tell them apart badly. There all cells are searched, for as many
        candidates as it takes until, by the errors of the codes that are seen, none of the others
        can be a hit.

        Args:
            query, top_k, nprobes, candidates: as in `nearest`.
            among: the vectors that may be found, by whatever condition.
        """
        if self._as_if_by_lot(query, nprobes, among):
            return self.nearest(query, top_k, nprobes, candidates, among)
        wanted = max(candidates, _CANDIDATES * top_k)
        while _FACTOR * wanted < among.count:
            named, approximate = self._named(query, wanted, self.cells, among)
            if len(named) < top_k:
                break
            scores = self._cosines(query, named)
            errors = scores - approximate
            reach = approximate.min() + errors.mean() + _DEVIATIONS * errors.std()
            if reach < np.partition(scores, -top_k)[-top_k]:
                near = _near(scores, top_k)
                return _in_order(named[near], scores[near])
            wanted *= _FACTOR
        return self.best(query, among.positions, top_k)

    def _as_if_by_lot(self, query: NDArray[np.float32], nprobes: int, among: Met) -> bool:
        """Whether the cells nearest to a query hold as many of some vectors as all cells do, or
        more; fewer by two deviations is hardly chance.
        """
        asked = np.ascontiguousarray(query[None], np.float32)
        _, cells = self._index.quantizer.search(asked, min(self.cells, max(1, nprobes // 4)))
        near = np.concatenate([self._in_cell[cell] for cell in cells[0].tolist()])
        share = among.count / len(self.vectors)
        expected = share * len(near)
        there = among.count_of(near)
        return bool(there >= expected - 2 * (expected * (1 - share)) ** 0.5)

    def best(
        self, query: NDArray[np.float32], of: Positions, top_k: int
    ) -> tuple[Positions, NDArray[np.float32]]:
        """The best of some vectors by comparing each, best first.

        There may be more than `top_k`: all that rounding lets no one tell from the last.
        """
        scores = self._cosines(query, of)
        near = _near(scores, top_k)
        return _in_order(of[near], scores[near])

    def _cosines(self, query: NDArray[np.float32], of: Positions) -> NDArray[np.float32]:
        """By FAISS's own sums, which read the mapped vectors where they lie."""
        scores = np.empty(len(of), np.float32)
        places = np.ascontiguousarray(of, np.int64)
        asked = np.ascontiguousarray(query, np.float32)
        self._faiss.omp_set_num_threads(1)  # counts for the thread that asks
        self._faiss.fvec_inner_products_by_idx(
            self._faiss.swig_ptr(scores),
            self._faiss.swig_ptr(asked),
            self._faiss.swig_ptr(self.vectors),
            self._faiss.swig_ptr(places),
            *(self.vectors.shape[1], 1, len(places)),
        )
        return scores

    def _named(
        self, query: NDArray[np.float32], wanted: int, probes: int, among: Met | None
    ) -> tuple[Positions, NDArray[np.float32]]:
        """What FAISS names, and the cosines by its codes."""
        selector = None
        if among is not None:
            bits = self._faiss.swig_ptr(among.bits)  # which FAISS only points at
            selector = self._faiss.IDSelectorBitmap(len(self.vectors), bits)
        options = self._faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        self._faiss.omp_set_num_threads(1)  # counts for the thread that asks
        scores, named = self._index.search(
            np.ascontiguousarray(query[None], np.float32), wanted, params=options
        )
        there = (named[0] >= 0) & (named[0] < len(self.vectors))
        return named[0][there], scores[0][there]


def _near(scores: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    """Which scores are among the best, or may be by rounding."""
    if len(scores) <= top_k:
        return np.ones(len(scores), bool)
    return np.asarray(~(scores < np.partition(scores, -top_k)[-top_k] - _ROUNDING))


def _in_order(of: Positions, scores: NDArray[np.float32]) -> tuple[Positions, NDArray[np.float32]]:
    order = np.argsort(-scores, kind="stable")
    return of[order], scores[order]


def write_neighbours(
    folder: Path,
    vectors: NDArray[np.float32],
    before: Path | None = None,
    said: NearestFacts | None = None,
) -> NearestFacts:
    """Write the codes, and say of them what `index.json` has to, but for the effort that a search
    takes.

    Args:
        folder: that is there.
        vectors: float32 [N, D], mapped.
        before: a folder of the codes of much the same vectors, whose cells are kept; None makes new
            ones.
        said: what `index.json` says of those.

    Raises:
        RAdapterError: the disk refuses.
    """
    faiss = load_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or total()))
    try:
        if before is not None and said is not None:
            index = faiss.read_index(str(before / CODES))
            index.reset()
            trained_on = said.trained_on
        else:
            index = _trained(faiss, vectors)
            trained_on = len(vectors)
        for start in range(0, len(vectors), _BLOCK):
            index.add(np.ascontiguousarray(vectors[start : start + _BLOCK]))
        faiss.write_index(index, str(folder / CODES))
    except RuntimeError as error:  # FAISS's own
        raise RAdapterError(f"cannot write {folder}: {reason(error):.300}") from None
    finally:
        faiss.omp_set_num_threads(threads)
    return NearestFacts(int(index.nlist), trained_on)


def _trained(faiss: Any, vectors: NDArray[np.float32]) -> Any:
    """An empty index whose cells and codes suit these vectors."""
    count, dim = vectors.shape
    cells = max(1, min(_MOST_CELLS, int(2 * count**0.5), count // _SAMPLE))
    parts = dim // 2 if dim % 2 == 0 else dim
    index = faiss.index_factory(dim, f"IVF{cells},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = _ROUNDS
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _SAMPLE
    index.pq.cp.min_points_per_centroid = 1
    chosen = np.random.default_rng(0).choice(
        count, min(count, max(_SAMPLE * cells, 16_384)), replace=False
    )
    index.train(vectors[np.sort(chosen)])
    return index


def load_faiss() -> Any:
    """FAISS, which only indexes of many images need.

    Raises:
        RAdapterError: it is not installed.
    """
    check_installed("faiss", "server")
    import faiss

    return faiss


def _fits(index: Any, faiss: Any, count: int, dim: int) -> bool:
    """Whether codes are of vectors of that shape."""
    return (
        isinstance(index, faiss.IndexIVFPQFastScan)
        and (index.ntotal, index.d, index.metric_type) == (count, dim, faiss.METRIC_INNER_PRODUCT)
        and index.invlists.compute_ntotal() == count
    )
