"""Adapters beside a release: maps of its finished text embeddings, which requests name.

They lie in `adapters/` of a model repository, apart from the files of the releases. One file,
`served.json`, says which are served; it is replaced as a whole, so a running server takes what is
added or removed with its next request.
"""

from __future__ import annotations

import bisect
import difflib
import io
import json
import re
import shlex
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.embeddings import Cache, map_embeddings
from radapter_serve.contract.errors import ADAPTER_FAILED, UNKNOWN_ADAPTER, TaskError, redact
from radapter_serve.contract.labels import check_prompts, is_name, known_as, merge_same_names
from radapter_serve.errors import RAdapterError, cause, check_installed, reason
from radapter_serve.files import (
    check_model_file,
    checker,
    digest_of,
    disk_errors,
    first_problem,
    lock,
    map_array,
    open_regular,
    parse_array,
    remove,
    staged_folder,
    state_of,
    write_text,
)
from radapter_serve.process import memory
from radapter_serve.release.release import Confidence, Release
from radapter_serve.release.repository import MODELS, releases_of, require_known
from radapter_serve.sources import ADAPTER

FOLDER = "adapters"
CLASSES = "classes"  # label set of the classes that an adapter was trained on
LIST = "served.json"
FACTS = "adapter.json"
FORMAT = 1
# Advice for an adapter without calibrated scores.
CALIBRATED_RUN = (
    "add a run of radapter-train --recipe quick on 100 images or more with one class each, at its"
    " own alpha"
)
# Advice for a file that holds no adapter of the text's projection
_TRAIN = "make one with radapter-train --recipe quick"
MAX_BYTES = 64 << 20  # of the list, and of the facts of an adapter
_RESERVED = "radapter"  # OpenAI's API names releases so
# In the error about an unknown name: names that are compared and shown, and least similarity
_COMPARED = 64
_NEAREST = 3
_SIMILAR = 0.4

# F of the adapter file [D, D], or its factors `up` [D, r] and `down` [r, D].
Factors = tuple[NDArray[np.float32]] | tuple[NDArray[np.float32], NDArray[np.float32]]
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Names of what `add` writes: folders of adapters, and temporary ones, which a killed command leaves
_WRITTEN = re.compile(rf".+@[0-9a-f]{{12}}(\.new|\.old)?|\.{re.escape(LIST)}\.\d+\.new")


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter in the list: its folder, the digests of its files, and the text tower that it
    belongs to.
    """

    folder: str
    text_tower: str
    sums: dict[str, str]  # of the files by their names

    def __post_init__(self) -> None:
        if not all(map(_DIGEST.fullmatch, (self.text_tower, *self.sums.values()))):
            raise ValueError("a digest is sha256: and 64 hexadecimal digits")

    @cached_property
    def digest(self) -> str:
        """Digest of the adapter: of the digests of its files."""
        return digest_of(json.dumps(self.sums, sort_keys=True).encode())


@dataclass(frozen=True)
class AdapterFacts:
    """The facts of an adapter, as stored in its `adapter.json`."""

    text_tower: str  # digest of the tower whose embeddings it maps
    width: int
    alpha: float  # of a request that gives none
    rank: int | None = None  # None for full rank
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    # Labels of each label set, with synonyms after commas.
    label_sets: dict[str, list[str]] = field(default_factory=dict)
    confidence: Confidence | None = None  # at `alpha`
    created: str = ""  # in UTC, ISO 8601
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; allowed: 0 to 1")
        if self.format > FORMAT:
            raise ValueError(f"format {self.format} is newer than this radapter-serve")


@dataclass(frozen=True, eq=False)
class TextAdapter:
    """A served adapter: its facts, and its matrix or thin matrices."""

    name: str
    digest: str
    facts: AdapterFacts
    factors: Factors

    @property
    def size(self) -> int:
        """Bytes of its matrices."""
        return sum(factor.nbytes for factor in self.factors)

    def map(self, embeds: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
        """Map text embeddings of the base, float32 [N, D], to those of the adapter at an α."""
        return map_embeddings(embeds, self.factors, alpha)


def read_list(repository: Path) -> dict[str, AdapterEntry]:
    """Read which adapters are served, by name; empty if there is no list."""
    from pydantic import ValidationError  # not a dependency of a base installation

    path = repository / FOLDER / LIST
    try:
        text = _read(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RAdapterError(f"could not read {path}: {error.strerror or error}") from None
    try:
        entries = checker(dict[str, AdapterEntry]).validate_json(text)
    except ValidationError as error:
        raise RAdapterError(f"could not read {path}: {first_problem(error)}") from None
    for name, entry in entries.items():
        if not is_name(name) or not is_name(entry.folder):
            raise RAdapterError(f"{path} has a name that is not allowed: {name!a:.80}")
    return entries


def read_run(path: Path, alpha: float | None = None) -> tuple[AdapterFacts, Factors]:
    """Read the adapter file of a run for `add`, without torch; raises an error if it changes more
    than the text's projection. `alpha` is by default the adapter's own.
    """
    check_installed("safetensors", "server")
    from pydantic import ValidationError
    from safetensors import SafetensorError, safe_open

    file = path / ADAPTER if path.is_dir() else path
    try:
        check_model_file(file)
        with safe_open(file, framework="np") as opened:
            header = {name: json.loads(text) for name, text in (opened.metadata() or {}).items()}
            names = sorted(opened.keys())
            key = names[0].removesuffix(".down") if names else ""
            wanted = [f"{key}.up", f"{key}.down"] if header["rank"] else [key]
            if "visual" in key or sorted(wanted) != names or header.get("text_tower") is None:
                raise RAdapterError(
                    f"{file} changes more than the text's projection, so it can't lie beside a"
                    " release; export it as a release of its own: radapter-export --adapter"
                    f" {shlex.quote(str(path))}"
                )
            factors: Any = tuple(opened.get_tensor(name) for name in wanted)
        # Classes with more prompts than a request may have would be refused at every request.
        classes = merge_same_names(header.get("classes") or ())
        try:
            check_prompts([(classes, header["templates"])])
        except TaskError:
            classes = []
        # Scores are calibrated at the run's own α.
        calibrated = header.get("confidence") if alpha in (None, header["alpha"]) else None
        facts = checker(AdapterFacts).validate_python(
            {
                "text_tower": header["text_tower"],
                "width": len(factors[0]),
                "alpha": header["alpha"] if alpha is None else alpha,
                "rank": header["rank"],
                "templates": header["templates"],
                "label_sets": {CLASSES: classes} if classes else {},
                "confidence": calibrated,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )
    except ValidationError as error:
        raise RAdapterError(f"{file} is not an adapter file: {first_problem(error)}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RAdapterError(
            f"could not read an adapter from {file}: {reason(error)}; {_TRAIN}"
        ) from None
    return facts, factors


def add(
    repository: Path,
    name: str,
    facts: AdapterFacts,
    factors: Factors,
    *,
    replace: bool = False,
) -> AdapterEntry:
    """Write an adapter beside the releases of a repository, and serve it under a name; raises an
    error for a name that is taken, unless `replace`.
    """
    check_name(name)
    try:
        check_factors(name, facts, factors)
    except RAdapterError as error:
        raise RAdapterError(f"{error}; {_TRAIN}") from None
    folder = repository / FOLDER
    with disk_errors(folder), lock(folder, "radapter-release"):
        entries = read_list(repository)
        if name in entries and not replace:
            raise RAdapterError(
                f"there is an adapter {name!r} already; replace it with --replace, or take another"
                " name"
            )

        # Write the files into a folder whose name has their digest. One of the same digest may be
        # served: its files are there at every moment.
        files = {FACTS: json.dumps(asdict(facts), indent=2).encode()}
        for file, array in zip(_files(facts), factors, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array, np.float32))
            files[file] = buffer.getvalue()
        sums = {file: digest_of(content) for file, content in files.items()}
        entry = AdapterEntry("", facts.text_tower, sums)
        entry = AdapterEntry(f"{name}@{shortened(entry.digest)}", facts.text_tower, sums)
        with staged_folder(folder / entry.folder, "radapter-release") as temporary:
            for file, content in files.items():
                (temporary / file).write_bytes(content)

        _write_list(folder, {**entries, name: entry})
    return entry


def releases_beside(repository: Path, facts: AdapterFacts) -> list[int]:
    """The releases of a repository that an adapter belongs to, which have its text tower."""
    beside = []
    for version in releases_of(repository):
        release = Release.load(repository / MODELS[-1] / str(version))
        tower = release.text_tower.digest(release.alpha)
        if (tower, release.embed_dim) == (facts.text_tower, facts.width):
            beside.append(version)
    return beside


def add_beside(
    repository: Path,
    name: str,
    facts: AdapterFacts,
    factors: Factors,
    run: Path,
    *,
    replace: bool = False,
) -> list[int]:
    """Add an adapter of a run, and return the releases that it belongs to; raises an error if there
    is none, as it was trained with another text tower.
    """
    require_known(repository, ())
    beside = releases_beside(repository, facts)
    if not beside:
        command = f"radapter-export --adapter {shlex.quote(str(run))}"
        raise RAdapterError(
            f"the adapter {name!r} was trained with another text tower than the releases of"
            f" {repository} have; export it as a release of its own: {command}; or its base, and"
            f" add it beside that: {command} --alpha 0"
        )
    add(repository, name, facts, factors, replace=replace)
    return beside


def remove_adapter(repository: Path, name: str) -> None:
    """Serve an adapter no longer, and remove its files; running requests end with it."""
    folder = repository / FOLDER
    with disk_errors(folder), lock(folder, "radapter-release"):
        entries = read_list(repository)
        if entries.pop(name, None) is None:
            raise RAdapterError(unknown_name(name, entries))
        _write_list(folder, entries)


def check_name(name: str) -> None:
    """Refuse a name that can't be that of an adapter."""
    if not is_name(name) or ":" in name or "@" in name or name.partition("-")[0] == _RESERVED:
        raise RAdapterError(
            f"{name!a:.80} can't be the name of an adapter; allowed are up to 200 bytes of letters,"
            " digits and other signs without /, : and @, no . or - or blank at the start, and"
            f" not {_RESERVED} or {_RESERVED}-N, which name releases"
        )


def check_factors(name: str, facts: AdapterFacts, factors: Factors) -> None:
    """Refuse matrices whose shapes, types or values do not fit the facts."""
    width = facts.width
    shapes = [(width, width)] if facts.rank is None else [(width, facts.rank), (facts.rank, width)]
    kinds = [(array.shape, array.dtype) for array in factors]
    if kinds != [(shape, np.dtype(np.float32)) for shape in shapes]:
        raise RAdapterError(f"the matrices of the adapter {name!r} are {kinds}, not {shapes}")
    if not all(np.isfinite(array).all() for array in factors):
        raise RAdapterError(f"the adapter {name!r} has values that are not finite")


def load(repository: Path, name: str, entry: AdapterEntry, *, mapped: bool = False) -> TextAdapter:
    """Read an adapter, or map its matrices from the disk; compare its files with their digests."""
    from pydantic import ValidationError

    folder = repository / FOLDER / entry.folder
    try:
        contents = {FACTS: _read(folder / FACTS)}
        facts = checker(AdapterFacts).validate_json(contents[FACTS])
        if entry.sums.keys() != {FACTS, *_files(facts)} or facts.text_tower != entry.text_tower:
            raise RAdapterError("its files are not those of the list")
        contents |= {file: _read(folder / file) for file in _files(facts)}
        for file, digest in entry.sums.items():
            if digest_of(contents[file]) != digest:
                raise RAdapterError(f"{file} differs from its digest")
        factors: Any = tuple(
            map_array(folder / file) if mapped else parse_array(contents[file])
            for file in _files(facts)
        )
        check_factors(name, facts, factors)
    except ValidationError as error:
        why = first_problem(error)
    except OSError as error:
        why = cause(error)
    except (RAdapterError, ValueError) as error:
        why = redact(reason(error))
    else:
        return TextAdapter(name, entry.digest, facts, factors)
    raise RAdapterError(
        f"the adapter {name!r} is damaged: {why}; add it again with radapter-release add-adapter"
        f" {name} RUN --replace"
    )


@cache
def _loaded() -> Cache:
    """The adapters that this process has loaded, beside all releases: their matrices take at most a
    quarter of its memory.
    """
    return Cache(memory() / 4)


class AdaptersBeside:
    """The adapters that one process serves beside one release. Thread-safe.

    The list is read again whenever its file has changed. An adapter is loaded, and `check` called
    with it, at its first request, and again after it had to make room for others; one that is
    damaged is refused, and the others serve.

    Args:
        repository: model repository with the list.
        text_tower: digest of the release's text tower; None takes the adapters of all towers.
        check: raises an `RAdapterError` for an adapter that does not fit the release.
        mapped: map matrices from the disk, so that processes share their memory, and load an
            adapter again when its files have changed. A file that is cut while its matrix is in
            use ends the process.
    """

    def __init__(
        self,
        repository: Path,
        text_tower: str | None,
        check: Callable[[TextAdapter], None] = lambda adapter: None,
        *,
        mapped: bool = False,
    ) -> None:
        self.repository = repository
        self._path = repository / FOLDER / LIST
        self._text_tower = text_tower
        self._check = check
        self._mapped = mapped
        self._lock = threading.Lock()
        self._state: object = ()  # of the list's file
        self._entries: Mapping[str, AdapterEntry] = {}
        self._itself = weakref.ref(self)

    def entries(self) -> Mapping[str, AdapterEntry]:
        """The served adapters of the text tower by name, as the list says now."""
        state = state_of(self._path)
        with self._lock:
            if state == self._state:
                return self._entries
            try:
                entries = read_list(self.repository)
            except RAdapterError as error:
                # A list that can't be read changes nothing: what is served stays.
                print(f"the adapters that were served before stay: {error}", file=sys.stderr)
            else:
                beside = {
                    name: entry
                    for name, entry in entries.items()
                    if self._text_tower in (None, entry.text_tower)
                }
                # Those that were removed, and those of releases that are no longer served.
                kept = {(self._itself, name, entry.digest) for name, entry in beside.items()}
                _loaded().drop(lambda key: key[0]() in (None, self) and key not in kept)
                self._entries = beside
            self._state = state
            return self._entries

    def get(self, name: str) -> TextAdapter:
        """The adapter of a name; raises a `TaskError` for an unknown or damaged one."""
        entries = self.entries()
        known = known_as(name, entries)
        if known is None:
            raise TaskError(UNKNOWN_ADAPTER, unknown_name(name, entries))
        entry = entries[known]
        key = self._itself, known, entry.digest
        # With the state of its files; instead of a damaged one, its error
        before, loaded = _loaded().get(key) or (None, None)
        if isinstance(loaded, TextAdapter) and not self._mapped:
            return loaded
        # A file that is written in place changes the answers if it is mapped.
        folder = self._path.parent / entry.folder
        state = [state_of(folder / file) for file in entry.sums]
        if loaded is None or before != state:
            try:
                loaded = load(self.repository, known, entry, mapped=self._mapped)
                self._check(loaded)
            except TaskError:  # of the encoder that the check asked
                raise
            except RAdapterError as error:
                # It may have been replaced or removed since the list was read, or added again.
                if self.entries() is not entries:
                    return self.get(name)
                print(error, file=sys.stderr)
                loaded = TaskError(ADAPTER_FAILED, str(error))
            _loaded().put(key, (state, loaded), getattr(loaded, "size", 1))
        if isinstance(loaded, TaskError):
            raise TaskError(loaded.code, loaded.what)
        return loaded


def shortened(digest: str) -> str:
    """The first 12 digits of an adapter's digest, as in the name of its folder and in receipts."""
    return digest.removeprefix("sha256:")[:12]


def unknown_name(name: str, names: Iterable[str]) -> str:
    """The error about an unknown adapter, with the names that are nearest to it: of many, those
    beside it in the order of the alphabet, as comparing with all would take a second.
    """
    known = sorted(names)
    place = bisect.bisect(known, name)
    start = max(0, min(place - _COMPARED // 2, len(known) - _COMPARED))
    near = difflib.get_close_matches(
        name[:200], known[start : start + _COMPARED], _NEAREST, _SIMILAR
    )
    shown = f"the nearest are: {', '.join(near)}" if near else f"{len(known)} others are served"
    return f"there is no adapter {name!a:.80} here; {shown}"


def _files(facts: AdapterFacts) -> tuple[str, ...]:
    return ("matrix.npy",) if facts.rank is None else ("up.npy", "down.npy")


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise RAdapterError(f"{path} has more than {MAX_BYTES:,} bytes")
    return text


def _write_list(folder: Path, entries: Mapping[str, AdapterEntry]) -> None:
    """Write the list, and remove the files of adapters that it does not name: those that were
    replaced or removed, also by a command that was killed before it could remove them.
    """
    values = {name: asdict(entry) for name, entry in sorted(entries.items())}
    write_text(folder / LIST, json.dumps(values, indent=1))
    served = {entry.folder for entry in entries.values()}
    for path in folder.iterdir():
        if _WRITTEN.fullmatch(path.name) and path.name not in served:
            remove(path)
