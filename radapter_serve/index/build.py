"""Building an index, and adding to it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import lancedb
import pyarrow as pa

from radapter_serve.contract.names import RULE, is_name
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.index import facts as known
from radapter_serve.index.cluster import Cluster
from radapter_serve.index.collection import Collection, open_collection
from radapter_serve.index.facts import (
    FACTS,
    MadeBy,
    OnBroken,
    Plan,
    build_command,
    mismatch,
)
from radapter_serve.index.index import link_of
from radapter_serve.index.integrity import check_files
from radapter_serve.index.store import TABLE
from radapter_serve.index.store.local import (
    Folder,
    generations_of,
    install,
    link_copy,
    table_errors,
)
from radapter_serve.index.writer import BROKEN, Base, Progress, Sizes, Summary, Writer
from radapter_serve.lock import lock
from radapter_serve.release.repository import releases_with_digest, split_repository

_STOPPED = "building.json"  # in the folder of an unfinished generation: the plan of the index
KEEP = datetime.timedelta(hours=1)  # how long servers may read a generation that was replaced


def build(
    source: str,
    out: Path,
    loaded: LoadedRelease,
    *,
    image_column: str = "image",
    thumbnails: int = 128,
    exif_orientation: bool | None = None,
    on_broken: OnBroken = "refuse",
    resume: bool = True,
    ray: str | None = None,
    progress: Progress | None = None,
    sizes: Sizes = Sizes(),  # noqa: B008  # frozen
) -> Summary:
    """Make an index, whole or not at all.

    A build that was stopped goes on. An index that the same release made of the same images is
    brought up to date. Any other index at `out` is replaced when the new one is complete.

    Args:
        source: a folder, `csv:FILE` or `parquet:FILE`.
        out: the index's folder; clients search by the folder's name.
        loaded: embeds the images.
        image_column: the table's column of image paths.
        thumbnails: longest side of a thumbnail, 0 (none) to 1024 px.
        exif_orientation: whether images are turned as their EXIF says; None does as the release
            does.
        on_broken: "skip" counts and names images that can't be read, "refuse" stops at the first.
        resume: False throws a stopped build away and embeds every image again.
        ray: address of a Ray cluster whose workers read and embed, or "auto"; None does so in this
            process.
        progress: called after every batch.
        sizes: how many images are embedded at once, and up to how many need no FAISS.

    Raises:
        RAdapterError: there is no image, an image is broken, `out` is something else, a stopped
            build had other arguments, or nothing could be written.
    """
    out = out.absolute()
    _check_place(out, thumbnails)
    if exif_orientation is not None:
        loaded = loaded.turned(exif_orientation)
    collection = open_collection(source, image_column=image_column)
    plan = Plan(
        source=collection.source,
        root=collection.root.as_posix(),
        image_column=image_column,
        column_types={name: str(kind) for name, kind in collection.columns.items()},
        thumbnails=thumbnails,
        exif_orientation=loaded.preprocess.exif_orientation,
        on_broken=on_broken,
        release=MadeBy.of(loaded.release),
        origin=dict(loaded.origin),
    )
    cluster = None if ray is None else Cluster(ray, loaded)

    def fill(writer: Writer) -> Summary:
        summary = writer.write(collection, on_broken, progress)
        there = {item.id for item in collection.items} - summary.broken.keys()
        summary.removed = writer.delete(writer.known.keys() - there)
        if not writer.known:
            raise RAdapterError(
                f"none of the {len(collection.items)} images of {collection.source} can be read"
            )
        return summary

    with _generation(out, plan, resume=resume, extend=False) as (made, base):
        writer = Writer(made, plan, loaded, out, _schema(plan, collection), cluster, sizes)
        return _finish(made, out, writer, fill, base)


def add(
    out: Path,
    loaded: LoadedRelease,
    source: str | None = None,
    *,
    prune: bool = False,
    on_broken: OnBroken | None = None,
    progress: Progress | None = None,
    sizes: Sizes = Sizes(),  # noqa: B008  # frozen
) -> Summary:
    """Embed what is new or has other bytes, and keep the rest. The addition is seen whole or not at
    all.

    Args:
        out: the index's folder.
        loaded: embeds the images; it must be the one that made the index, or the same exported
            again.
        source: where to look, as in `build`; None takes the index's own source.
        prune: remove images whose files are gone.
        on_broken: as in `build`; None does as the last build or addition did.
        progress: as in `build`.
        sizes: how many images are embedded at once, and up to how many need no FAISS.

    Raises:
        RAdapterError: there is no index, another release made it, or what `build` raises.
    """
    out = out.absolute()
    _refuse_link(out)
    _, facts = Folder(out).current()
    plan = facts.plan
    if loaded.release.dynamic_alpha:
        loaded = loaded.at(plan.release.alpha)
    if plan.release.digest != loaded.release.digest:
        raise RAdapterError(_other_release(out, plan, loaded))
    loaded = loaded.turned(plan.exif_orientation)
    plan = dataclasses.replace(
        plan, origin=dict(loaded.origin), on_broken=on_broken or plan.on_broken
    )
    root = Path(plan.root)
    collection = open_collection(source or plan.source, image_column=plan.image_column, root=root)

    def fill(writer: Writer) -> Summary:
        writer.check_columns(collection)
        summary = writer.write(collection, plan.on_broken, progress)
        if prune:
            summary.removed = writer.delete(
                {id for id in writer.known if not os.path.lexists(root / id)}
            )
        return summary

    with _generation(out, plan, resume=True, extend=True) as (made, base):
        writer = Writer(made, plan, loaded, out, _schema(plan, collection), sizes=sizes)
        return _finish(made, out, writer, fill, base)


@contextlib.contextmanager
def _generation(
    out: Path, plan: Plan, *, resume: bool, extend: bool
) -> Iterator[tuple[Path, Base | None]]:
    """A folder in which the next generation of an index is made; one writer at a time.

    It goes on with what a stopped command left, or begins as a copy of the generation that counts
    where that is of the same plan and whole, or with nothing. What is embedded in it stays where
    the work fails.

    Args:
        out: folder of the index.
        plan: of the index.
        resume: False begins with nothing.
        extend: whether the generation that counts has to be whole: what is damaged would be written
            anew with other digests.

    Yields:
        The folder; the generation that it began as a copy of, or None.

    Raises:
        RAdapterError: another command writes the index, a stopped one had another plan, or the
            index is damaged.
    """
    made = out.with_name(f".{out.name}.building")
    with disk_errors(out), lock(made, "radapter-index"), _removed_if_empty(made):
        base = None
        with contextlib.nullcontext() if extend else contextlib.suppress(RAdapterError):
            base = _whole(out) if resume else None
        if base is not None and base.facts.plan.differences(plan):
            base = None
        with _kept_or_removed(made, base), disk_errors(out):
            if resume and _holds_rows(made):
                _check_stopped(made, out, plan)
            else:
                _empty(made)
                if base is not None:
                    link_copy(base.folder / f"{TABLE}.lance", made / f"{TABLE}.lance")
                (made / _STOPPED).write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
            yield made, base


def _finish(
    made: Path,
    out: Path,
    writer: Writer,
    fill: Callable[[Writer], Summary],
    base: Base | None,
) -> Summary:
    """Fill a generation and have it be the one that counts; where it is as the one before, that
    stays.
    """
    summary = fill(writer)
    facts = writer.finish(summary, base)
    if summary.changed:
        made = install(made, out, facts, KEEP)
        (made / _STOPPED).unlink()
    (made / BROKEN).replace(out / BROKEN)
    if not summary.changed:
        shutil.rmtree(made)
    return summary


def _whole(out: Path) -> Base:
    """The generation that counts.

    Raises:
        RAdapterError: there is none, or its table is damaged.
    """
    generation, facts = Folder(out).current()
    with table_errors(out, facts.plan):
        check_files(out / generation / f"{TABLE}.lance", facts.files, complete=True)
    return Base(out / generation, facts)


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_place(out: Path, thumbnails: int) -> None:
    if not 0 <= thumbnails <= 1024:
        raise RAdapterError(f"--thumbnails is {thumbnails}; allowed: 0 (none) to 1024 px")
    if not is_name(out.name):
        raise RAdapterError(f"{out.name!r} can't be the name of an index; {RULE}")
    _refuse_link(out)
    if out.exists() and not (out / FACTS).is_file() and not generations_of(out):
        raise RAdapterError(
            f"{out} already exists and is not an index; give another folder with --out"
        )


def _refuse_link(out: Path) -> None:
    if link_of(out):
        raise RAdapterError(
            f"{out} links to a published index, which is read-only; change the index that was"
            " published there, and publish it again with radapter-index publish"
        )


def _check_stopped(made: Path, out: Path, plan: Plan) -> None:
    """Refuse to go on with what was stopped where it makes another index."""
    try:
        stopped = known.read(Plan, json.loads((made / _STOPPED).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise RAdapterError(
            f"what was stopped of {out} can't be gone on with; throw it away with --no-resume"
        ) from None
    if other := stopped.differences(plan):
        raise RAdapterError(
            f"a build of {out} was stopped that had another {', '.join(other)}; finish it: "
            f"{build_command(out, stopped)}, or throw it away with --no-resume"
        )


def _other_release(out: Path, plan: Plan, loaded: LoadedRelease) -> str:
    """Why `add` refuses, and the commands that help."""
    again = build_command(out, plan, loaded.release, loaded.origin)
    text = f"the index {out} {mismatch(plan.release, loaded.release)}; build it again: {again}"
    repository, version = made_by(plan)
    if version is not None:
        place = f"{repository}@{version}"
        command = shlex.join(
            ["radapter-index", "add", "--out", str(out), "--model-repository", place]
        )
        text += f"; or add to it by the release that made it: {command}"
    return text


def made_by(plan: Plan) -> tuple[str, int | None]:
    """The model repository that an index was made from, and the number there of the release that
    made it.

    The repository is empty where a server made the index, and the number None where the release is
    gone.
    """
    repository, _ = split_repository(plan.origin.get("model_repository", ""))
    if not repository:
        return "", None
    found = releases_with_digest(Path(repository), plan.release.digest, plan.release.alpha)
    return repository, max(found, default=None)


def _schema(plan: Plan, collection: Collection) -> pa.Schema:
    return pa.schema(
        [
            ("path", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("digest", pa.string()),
            *collection.columns.items(),
            ("thumbnail", pa.binary()),
            ("vector", pa.list_(pa.float32(), plan.release.embed_dim)),
        ]
    )


def _holds_rows(made: Path) -> bool:
    """Whether what was stopped has embedded anything."""
    with contextlib.suppress(Exception):
        return bool(lancedb.connect(made).open_table(TABLE).count_rows())
    return False


@contextlib.contextmanager
def _kept_or_removed(made: Path, base: Base | None) -> Iterator[None]:
    """Where the work fails: keep what is embedded and say how to go on, or leave nothing where
    nothing was.
    """
    try:
        yield
    except BaseException as error:
        if not _embedded_anything(made, base):
            shutil.rmtree(made, ignore_errors=True)
            raise
        kept = "the embeddings so far are kept: give the same command again to continue"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from error
        if isinstance(error, RAdapterError):
            raise RAdapterError(f"{error}; {kept}") from error
        raise


def _embedded_anything(made: Path, base: Base | None) -> bool:
    if base is None:
        return _holds_rows(made)
    with contextlib.suppress(Exception):
        return bool(lancedb.connect(made).open_table(TABLE).version != base.facts.table_version)
    return False


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error for people."""
    try:
        yield
    except OSError as error:
        raise RAdapterError(f"cannot write {out}: {error.strerror or error}") from error
