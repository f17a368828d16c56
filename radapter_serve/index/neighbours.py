"""Which vectors of a big index are nearest: FAISS names candidates, and the vectors themselves sort
them.

A folder `neighbours` lies next to the table of a generation. It holds `codes.faiss` (IVF-PQ with
4-bit codes, in memory), `vectors.npy` (float16, mapped) and `rows.npy` (LanceDB's row ids in the
same order).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.files import ascii_path, digest_of
from radapter_serve.index.arrays import npy_file
from radapter_serve.index.facts import FileFacts, NearestFacts
from radapter_serve.threads import total

FOLDER = "neighbours"
KIND = "IVF-PQ"
CODES, VECTORS, ROWS = "codes.faiss", "vectors.npy", "rows.npy"
FILES = (CODES, VECTORS, ROWS)
_MOST_CELLS = 65_536
_SAMPLE = 32  # vectors that a cell's centre is computed from
_ROUNDS = 10  # of k-means; more change little
_CANDIDATES = 8  # for each hit at least
_FACTOR = 4  # how much more is searched where it was too little
_DEVIATIONS = 4  # of the errors of codes, beyond which no vector is looked for
# Four deviations of the error that float16 gives a cosine, times the root of D.
_ROUNDING = 2.0**-10
_BLOCK = 10_000  # vectors at a time

Positions = NDArray[np.int64]


class Neighbours:
    """The vectors of an index, to be searched; one thread a search, and any number of searches at
    once.

    Args:
        folder: of the files.
        said: what `index.json` says of them.
        shape: number of vectors, and D.

    Raises:
        RAdapterError: a file is missing, or is not what `index.json` says.

    Attributes:
        rows: LanceDB's row id of each vector, uint64 [N].
        vectors: float16 [N, D], mapped.
    """

    def __init__(self, folder: Path, said: NearestFacts, shape: tuple[int, int]) -> None:
        self._faiss = load_faiss()
        try:
            for name in FILES:
                if not _is_what(folder / name, said.files[name]):
                    raise RAdapterError(
                        f"{folder / name} is missing, or is not the file that index.json names"
                    )
            self.rows = np.load(folder / ROWS, allow_pickle=False)
            self.vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            self._index = self._faiss.read_index(str(ascii_path(folder) / CODES))
        except RAdapterError:
            raise
        except Exception as error:
            # FAISS raises RuntimeError, numpy ValueError, a fact of another type TypeError.
            raise RAdapterError(f"{folder} can't be read: {reason(error):.300}") from None
        _check(self, self._index, self._faiss, folder, shape)
        self.cells = int(self._index.nlist)
        ascending = bool((self.rows[1:] > self.rows[:-1]).all())
        self._order = None if ascending else np.argsort(self.rows)
        self._sorted = self.rows if self._order is None else self.rows[self._order]

    def rows_of(self, positions: Positions) -> NDArray[np.uint64]:
        """The row ids of vectors."""
        return np.asarray(self.rows[positions], np.uint64)

    def positions(self, rows: NDArray[np.uint64]) -> Positions:
        """The positions of the vectors with these row ids."""
        found = np.searchsorted(self._sorted, rows)
        return found if self._order is None else self._order[found]

    def nearest(
        self, query: NDArray[np.float32], top_k: int, nprobes: int, candidates: int
    ) -> tuple[Positions, NDArray[np.float32]]:
        """The nearest of all vectors and their cosines, best first, as `best` has them.

        Args:
            query: float32 [D], unit length.
            top_k: how many, 1 to N.
            nprobes: cells that are searched for ten; more are for more.
            candidates: how many FAISS names at least, which the vectors themselves sort.
        """
        count = len(self.rows)
        wanted = min(count, max(candidates, _CANDIDATES * top_k))
        probes = min(self.cells, round(nprobes * max(1.0, top_k / 10) ** 0.5))
        while True:
            named, approximate = self._named(query, wanted, probes)
            if len(named) < top_k and probes < self.cells:
                probes = min(self.cells, _FACTOR * probes)
                continue
            found, scores = self.best(query, named, top_k)
            # Where a hit is the last that FAISS named, its equals may be left out.
            tied = approximate[np.isin(named, found)].min() <= approximate.min()
            if not tied or len(named) < wanted or wanted == count:
                return found, scores
            wanted = min(count, _FACTOR * wanted)

    def nearest_of(
        self, query: NDArray[np.float32], top_k: int, candidates: int, among: Positions
    ) -> tuple[Positions, NDArray[np.float32]]:
        """The nearest of some vectors and their cosines, best first, as `best` has them.

        What a condition leaves may lie anywhere, also where vectors are dense and codes tell them
        apart badly. Therefore all cells are searched, for as many candidates as it takes until, by
        the errors of the codes that are seen, none of the others can be a hit.

        Args:
            query: float32 [D], unit length.
            top_k: how many, 1 to len(among).
            candidates: how many FAISS names at least.
            among: positions of the vectors that may be found.
        """
        selector = self._selector(among)
        wanted = max(candidates, _CANDIDATES * top_k)
        while _FACTOR * wanted < len(among):
            named, approximate = self._named(query, wanted, self.cells, selector)
            if len(named) < top_k:
                break
            scores = self._cosines(query, named)
            errors = scores - approximate
            reach = approximate.min() + errors.mean() + _DEVIATIONS * errors.std()
            if reach < np.partition(scores, -top_k)[-top_k]:
                return self._finalists(named, scores, top_k)
            wanted *= _FACTOR
        return self.best(query, among, top_k)

    def best(
        self, query: NDArray[np.float32], of: Positions, top_k: int
    ) -> tuple[Positions, NDArray[np.float32]]:
        """The best of some vectors by comparing each, best first.

        There may be more than `top_k`: all whose float16 vectors don't say whether they are among
        the best.
        """
        return self._finalists(of, self._cosines(query, of), top_k)

    def _finalists(
        self, of: Positions, scores: NDArray[np.float32], top_k: int
    ) -> tuple[Positions, NDArray[np.float32]]:
        if len(scores) > top_k:
            rounding = _ROUNDING / self.vectors.shape[1] ** 0.5
            near = scores >= np.partition(scores, -top_k)[-top_k] - rounding
            of, scores = of[near], scores[near]
        order = np.argsort(-scores, kind="stable")
        return of[order], scores[order]

    def _cosines(self, query: NDArray[np.float32], of: Positions) -> NDArray[np.float32]:
        parts = [
            self.vectors[of[start : start + _BLOCK]].astype(np.float32) @ query
            for start in _starts(len(of))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _named(
        self, query: NDArray[np.float32], wanted: int, probes: int, selector: Any = None
    ) -> tuple[Positions, NDArray[np.float32]]:
        """What FAISS names, and the cosines by its codes."""
        options = self._faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        self._faiss.omp_set_num_threads(1)  # counts for the thread that asks
        scores, named = self._index.search(
            np.ascontiguousarray(query[None], np.float32), wanted, params=options
        )
        there = (named[0] >= 0) & (named[0] < len(self.rows))
        return named[0][there], scores[0][there]

    def _selector(self, among: Positions) -> Any:
        marks = np.zeros(len(self.rows), bool)
        marks[among] = True
        bits = np.packbits(marks, bitorder="little")
        selector = self._faiss.IDSelectorBitmap(len(self.rows), self._faiss.swig_ptr(bits))
        selector.bits = bits  # which FAISS only points at
        return selector


def write_neighbours(
    folder: Path,
    batches: Iterable[tuple[NDArray[np.uint64], NDArray[np.float32]]],
    shape: tuple[int, int],
    before: Path | None = None,
    said: NearestFacts | None = None,
) -> NearestFacts:
    """Write the files, and say of them what `index.json` has to, but for the effort that a search
    takes.

    Args:
        folder: to make; what a stopped build left there goes.
        batches: row ids [B] and vectors, float32 [B, D], in the order of the table.
        shape: number of vectors, and D.
        before: a folder of much the same vectors, whose cells are kept if it is intact; None makes
            new ones.
        said: what `index.json` says of that folder.
    """
    faiss = load_faiss()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        _write_vectors(folder, batches, shape)
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or total()))
        try:
            if before is not None and said is not None and intact(before, said):
                index, trained_on = faiss.read_index(str(before / CODES)), said.trained_on
                index.reset()
            else:
                index, trained_on = _trained(faiss, vectors), len(vectors)
            for start in _starts(len(vectors)):
                index.add(vectors[start : start + _BLOCK].astype(np.float32))
        finally:
            faiss.omp_set_num_threads(threads)
        faiss.write_index(index, str(folder / CODES))
        files = {
            name: FileFacts((folder / name).stat().st_size, digest_of(folder / name))
            for name in FILES
        }
    except (OSError, RuntimeError) as error:  # FAISS's own are RuntimeErrors
        shutil.rmtree(folder, ignore_errors=True)
        raise RAdapterError(f"cannot write {folder}: {reason(error):.300}") from None
    return NearestFacts(int(index.nlist), trained_on, files)


def _write_vectors(
    folder: Path,
    batches: Iterable[tuple[NDArray[np.uint64], NDArray[np.float32]]],
    shape: tuple[int, int],
) -> None:
    """Write rows and vectors as they come."""
    rows: list[NDArray[np.uint64]] = []
    with npy_file(folder / VECTORS, "<f2", shape) as write:
        for ids, part in batches:
            rows.append(ids)
            write(part)
    if sum(map(len, rows)) != shape[0]:
        raise RAdapterError(
            f"the table has {sum(map(len, rows))} vectors and should have {shape[0]}"
        )
    np.save(folder / ROWS, np.concatenate(rows))


def _trained(faiss: Any, vectors: NDArray[np.float16]) -> Any:
    """An empty index whose cells and codes suit these vectors."""
    count, dim = vectors.shape
    cells = max(1, min(_MOST_CELLS, int(2 * count**0.5), count // _SAMPLE))
    parts = dim // 2 if dim % 2 == 0 else dim
    index = faiss.index_factory(dim, f"IVF{cells},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = (
        _ROUNDS,
        1,
        _SAMPLE,
    )
    index.pq.cp.min_points_per_centroid = 1
    chosen = np.random.default_rng(0).choice(
        count, min(count, max(_SAMPLE * cells, 16_384)), replace=False
    )
    index.train(vectors[np.sort(chosen)].astype(np.float32))
    return index


def load_faiss() -> Any:
    """FAISS, which only indexes of many images need.

    Raises:
        RAdapterError: it is not installed.
    """
    check_installed("faiss", "server")
    import faiss

    return faiss


def intact(folder: Path, said: NearestFacts) -> bool:
    """Whether the files are those that `index.json` names."""
    with contextlib.suppress(OSError, KeyError):
        return all(_is_what(folder / name, said.files[name]) for name in FILES)
    return False


def _is_what(path: Path, said: FileFacts) -> bool:
    return path.is_file() and path.stat().st_size == said.size and digest_of(path) == said.digest


def _check(made: Neighbours, index: Any, faiss: Any, folder: Path, shape: tuple[int, int]) -> None:
    """Refuse files that do not belong together."""
    count, dim = shape
    fits = (
        isinstance(index, faiss.IndexIVFPQFastScan)
        and (index.ntotal, index.d, index.metric_type) == (count, dim, faiss.METRIC_INNER_PRODUCT)
        and index.invlists.compute_ntotal() == count
        and (made.rows.shape, made.rows.dtype) == ((count,), np.uint64)
        and (made.vectors.shape, made.vectors.dtype) == (shape, np.float16)
    )
    if not fits:
        raise RAdapterError(
            f"{folder} does not hold the {count} vectors of width {dim} that index.json names"
        )


def _starts(count: int) -> range:
    return range(0, count, _BLOCK)
