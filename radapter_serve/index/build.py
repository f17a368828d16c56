"""Building an index, and adding to it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from radapter_serve.errors import RAdapterError
from radapter_serve.files import swap_in
from radapter_serve.index.bucket import link_of
from radapter_serve.index.cluster import Cluster
from radapter_serve.index.collection import Collection, open_collection
from radapter_serve.index.index import (
    FACTS,
    FORMAT,
    TABLE,
    Index,
    build_command,
    mismatch,
    read_facts,
)
from radapter_serve.index.stored import file_of
from radapter_serve.index.writer import (
    OnBroken,
    Progress,
    Summary,
    Writer,
)
from radapter_serve.inputs.names import RULE, is_name
from radapter_serve.lock import lock
from radapter_serve.release.repository import releases_with_digest, split_repository
from radapter_serve.runtimes.embedding_release import EmbeddingRelease

_STOPPED = "building.json"  # in the folder of an unfinished build: the facts of the index that it makes
_OF_RELEASE = (
    *("architecture", "alpha", "dynamic_alpha", "version", "precision"),
    *("base_digest", "adapter_digest", "embed_dim"),
)
#: where an index and a build differ in one of these facts, every image is embedded again
_DECIDING = {
    "release_digest": "release",
    "root": "folder",
    "image_column": "image column",
    "column_types": "columns",
    "thumbnails": "size of thumbnails",
    "exif_orientation": "EXIF orientation",
}
KEEP = datetime.timedelta(hours=1)  # how long servers may read a version of the table that was replaced
_DROP = datetime.timedelta(milliseconds=1)


def build(
    source: str,
    out: Path,
    release: EmbeddingRelease,
    *,
    image_column: str = "image",
    thumbnails: int = 128,
    exif_orientation: bool | None = None,
    on_broken: OnBroken = "refuse",
    resume: bool = True,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Make an index, whole or not at all.

    A build that was stopped goes on. An index that the same release made of the same images is brought up to date. Any
    other index at `out` is replaced when the new one is complete.

    Args:
        source: a folder, `csv:FILE` or `parquet:FILE`, on disk or on object storage (`s3://`).
        out: the index's folder; clients search by the folder's name.
        release: embeds the images.
        image_column: the table's column of image paths.
        thumbnails: longest side of a thumbnail, 0 (none) to 1024 px.
        exif_orientation: whether images are turned as their EXIF says; None does as the release does.
        on_broken: "skip" counts and names images that can't be read, "refuse" stops at the first.
        resume: False throws a stopped build away and embeds every image again.
        ray: address of a Ray cluster whose workers read and embed, or "auto"; None does so in this process.
        progress: called after every batch.

    Raises:
        RAdapterError: there is no image, an image is broken, `out` is something else, a stopped build had other
            arguments, or nothing could be written.
    """
    out = out.absolute()
    _check_place(out, thumbnails)
    collection = open_collection(source, image_column=image_column)
    turned = _turn(release, exif_orientation)
    facts = _planned(collection, image_column, release, thumbnails, turned, on_broken)
    cluster = None if ray is None else Cluster(ray, release)
    with disk_errors(out), lock(out, "radapter-index") if out.exists() else contextlib.nullcontext():
        staged = out.with_name(f".{out.name}.building")
        goes_on = resume and _holds_rows(staged)
        if resume and not goes_on and not _differences(made := _read_made(out), facts):
            return _fill(out, made | facts, release, collection, on_broken, KEEP, progress, cluster)
        with lock(staged, "radapter-index"):
            if goes_on:
                _check_stopped(staged, out, facts)
            with _kept_or_removed(staged), disk_errors(out):
                if not goes_on:
                    shutil.rmtree(staged / f"{TABLE}.lance", ignore_errors=True)
                    (staged / _STOPPED).write_text(json.dumps(facts), encoding="utf-8")
                summary = _fill(staged, facts, release, collection, on_broken, _DROP, progress, cluster)
                swap_in(staged, out, out.with_name(f".{out.name}.old"))
                (out / _STOPPED).unlink()
    return summary


def add(
    out: Path,
    release: EmbeddingRelease,
    source: str | None = None,
    *,
    prune: bool = False,
    on_broken: OnBroken | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Embed what is new or has other bytes, and keep the rest. The addition is seen whole or not at all.

    Args:
        out: the index's folder.
        release: embeds the images; it must be the one that made the index, or the same exported again.
        source: where to look, as of `build`; None takes the index's own source.
        prune: remove images whose files are gone.
        on_broken: as of `build`; None does as the last build or addition did.
        progress: as of `build`.

    Raises:
        RAdapterError: there is no index, another release made it, or as of `build`.
    """
    out = out.absolute()
    _refuse_link(out)
    read_facts(out)  # locking would make the folder
    with disk_errors(out), lock(out, "radapter-index"):
        # What is damaged would be written anew with other digests.
        facts = Index(out, searched=False, complete=True).facts
        if release.facts.dynamic_alpha:
            release.set_alpha(facts["release"]["alpha"])
        if facts["release_digest"] != release.facts.digest:
            raise RAdapterError(_other_release(out, facts, release))
        _turn(release, facts["exif_orientation"])
        on_broken = on_broken or facts["on_broken"]
        root = Path(facts["root"])
        collection = open_collection(source or facts["source"], image_column=facts["image_column"], root=root)
        writer = Writer(out, {**facts, "origin": dict(release.origin), "on_broken": on_broken}, release)
        writer.check_columns(collection)
        summary = writer.write(collection, on_broken, progress)
        if prune:
            summary.removed = writer.delete({id for id in writer.known if not _is_there(id, root)})
        writer.finish(summary, KEEP)
    return summary


def _check_place(out: Path, thumbnails: int) -> None:
    if not 0 <= thumbnails <= 1024:
        raise RAdapterError(f"--thumbnails is {thumbnails}; allowed: 0 (none) to 1024 px")
    if not is_name(out.name):
        raise RAdapterError(f"{out.name!r} can't be the name of an index; {RULE}")
    _refuse_link(out)
    if out.exists() and not (out / FACTS).is_file():
        raise RAdapterError(f"{out} already exists and is not an index; give another folder with --out")


def _is_there(id: str, root: Path) -> bool:
    file = file_of(id, root)
    return os.path.lexists(file) if isinstance(file, Path) else file.exists()


def _refuse_link(out: Path) -> None:
    if link_of(out):
        raise RAdapterError(
            f"{out} stands for a published index, which is read-only; change the index that was published "
            "there, and publish it again with radapter-index publish"
        )


def _planned(
    collection: Collection,
    image_column: str,
    release: EmbeddingRelease,
    thumbnails: int,
    exif_orientation: bool,
    on_broken: OnBroken,
) -> dict[str, Any]:
    """What is known of an index before it is built."""
    return {
        "format": FORMAT,
        "source": collection.source,
        "image_column": image_column,
        "column_types": {name: str(kind) for name, kind in collection.columns.items()},
        "root": collection.root.as_posix(),
        "release_digest": release.facts.digest,
        "release": {name: getattr(release.facts, name) for name in _OF_RELEASE},
        "origin": dict(release.origin),
        "thumbnails": thumbnails,
        "exif_orientation": exif_orientation,
        "on_broken": on_broken,
    }


def _check_stopped(staged: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to go on with a build that was stopped where it makes another index."""
    stopped: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        stopped = dict(json.loads((staged / _STOPPED).read_text(encoding="utf-8")))
    if other := _differences(stopped, facts):
        command = f": {build_command(out, stopped)}" if stopped.keys() >= facts.keys() else ""
        raise RAdapterError(
            f"a build of {out} was stopped that had another {', '.join(other)}; finish it{command}, or throw it away "
            "with --no-resume"
        )


def _fill(
    folder: Path,
    facts: dict[str, Any],
    release: EmbeddingRelease,
    collection: Collection,
    on_broken: OnBroken,
    keep: datetime.timedelta,
    progress: Progress | None,
    cluster: Cluster | None,
) -> Summary:
    """Bring a folder's table in line with a collection."""
    writer = Writer(folder, facts, release, _schema(facts, collection), cluster)
    summary = writer.write(collection, on_broken, progress)
    there = {item.id for item in collection.items} - summary.broken.keys()
    summary.removed = writer.delete(writer.known.keys() - there)
    if not writer.known:
        raise RAdapterError(f"none of the {len(collection.items)} images of {collection.source} can be read")
    writer.finish(summary, keep)
    return summary


def _turn(release: EmbeddingRelease, wanted: bool | None) -> bool:
    """Have the release turn images by their EXIF orientation or not; None leaves it as it is."""
    own = bool(release.facts.preprocess.get("exif_orientation", True))
    if wanted is None or wanted == own:
        return own
    release.turn(wanted)
    return wanted


def _other_release(out: Path, facts: Mapping[str, Any], release: EmbeddingRelease) -> str:
    """Why `add` refuses, and the commands that help."""
    again = build_command(out, facts, release.facts, release.origin)
    text = f"the index {out} {mismatch(facts, release.facts)}; build it again: {again}"
    repository, version = made_by(facts)
    if version is not None:
        place = f"{repository}@{version}"
        add = shlex.join(["radapter-index", "add", "--out", str(out), "--model-repository", place])
        text += f"; or add to it by the release that made it: {add}"
    return text


def made_by(facts: Mapping[str, Any]) -> tuple[str, int | None]:
    """The model repository that an index was made from, and the number there of the release that made it.

    The repository is empty where a server made the index, and the number None where the release is gone.
    """
    repository, _ = split_repository(facts["origin"].get("model_repository", ""))
    if not repository:
        return "", None
    found = releases_with_digest(Path(repository), facts["release_digest"], facts["release"]["alpha"])
    return repository, max(found, default=None)


def _differences(made: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """In what an index, or a stopped build, is unlike the one that is to be built."""
    return [word for name, word in _DECIDING.items() if made.get(name) != facts[name]]


def _schema(facts: Mapping[str, Any], collection: Collection) -> pa.Schema:
    return pa.schema(
        [
            ("path", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("digest", pa.string()),
            *collection.columns.items(),
            ("thumbnail", pa.binary()),
            ("vector", pa.list_(pa.float32(), int(facts["release"]["embed_dim"]))),
        ]
    )


def _holds_rows(staged: Path) -> bool:
    """Whether a stopped build has embedded anything."""
    with contextlib.suppress(Exception):
        return staged.is_dir() and bool(lancedb.connect(staged).open_table(TABLE).count_rows())
    return False


def _read_made(out: Path) -> dict[str, Any]:
    """The facts of a finished index; none where there is no index that can be used."""
    with contextlib.suppress(RAdapterError):
        return Index(out, searched=False, complete=True).facts
    return {}


@contextlib.contextmanager
def _kept_or_removed(staged: Path) -> Iterator[None]:
    """Where a build fails: keep what it has embedded and say how to go on, or leave nothing where it has nothing."""
    try:
        yield
    except BaseException as error:
        if not _holds_rows(staged):
            shutil.rmtree(staged, ignore_errors=True)
            raise
        kept = "the embeddings so far are kept: give the same command again to continue"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from error
        if isinstance(error, RAdapterError):
            raise RAdapterError(f"{error}; {kept}") from error
        raise


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error for people."""
    try:
        yield
    except OSError as error:
        raise RAdapterError(f"cannot write {out}: {error.strerror or error}") from error
