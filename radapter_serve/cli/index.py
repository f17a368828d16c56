"""radapter-index: build indexes of images for `retrieve`, update, inspect and publish them."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from radapter_serve.cli import run
from radapter_serve.encoders.precision import Precision
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.process import handled

if TYPE_CHECKING:
    from radapter_serve.encoders.loaded import LoadedRelease
    from radapter_serve.index.facts import Mapped

PROG = "radapter-index"
DESCRIPTION = "Build and maintain an index: the embeddings of a collection of images, to search."
FIRST = {
    "build": (
        *("source", "out", "from_embeddings", "rows", "model_repository", "url", "precision"),
        "on_broken",
    ),
    "add": ("source", "out", "prune", "on_broken"),
    "map": ("out", "model_repository", "url", "min_recall", "embed"),
}
_NAMED = 10  # most ids in a printed list


@dataclass(frozen=True)
class Embedder:
    """The release that embeds images.

    Args:
        model_repository: its served release embeds the images (radapter-release list); DIR@N for
            release N.
        url: a live server that embeds the images instead, such as http://localhost:8000.
        precision: of computing an fp32 release: bf16 takes OpenVINO on a processor that has bf16;
            auto takes what encodes fastest; as exported if not given. The index keeps it.
        alpha: α from 0 to 1 of images and, later, queries, for a release that takes any
            (radapter-export --alpha dynamic); the release's own if not given.
    """

    model_repository: str = "model_repository"
    url: str | None = None
    precision: Precision | None = None
    alpha: float | None = None

    @contextmanager
    def loaded(self) -> Iterator[LoadedRelease]:
        """Yield the release, at its α and in its precision, and print what it is."""
        from radapter_serve.encoders.loaded import release_at

        if self.url and self.precision is not None:
            raise RAdapterError(
                f"--precision is {self.precision}, but {self.url} embeds in its own; leave it out,"
                " or start the server with it"
            )
        origin = {"url": self.url} if self.url else {"model_repository": self.model_repository}
        with closing(release_at(origin, None, self.precision, print)) as loaded:
            if self.alpha is not None:
                loaded = loaded.at(self.alpha)
            _print_embedder(loaded)
            yield loaded


@dataclass(frozen=True)
class Reading:
    """How images are read and kept.

    Args:
        image_column: column of a table that holds the paths; the others become metadata.
        thumbnails: longest side of a thumbnail in px; 0 for none.
        exif_orientation: turn images according to their EXIF orientation, if the release does so
            with queries; --no-exif-orientation leaves them as in the files, as open_clip does.
        on_broken: refuse stops the build at an image that can't be read; skip leaves it out, and
            names it in OUT/broken.txt.
        resume: continue a stopped build, and keep embeddings of unchanged images; --no-resume
            discards a stopped build and embeds every image again.
        ray: address of a Ray cluster whose workers read and embed, or auto for the one of this
            machine; workers need the same paths. This machine reads and embeds if not given.
    """

    image_column: str = "image"
    thumbnails: int = 128
    exif_orientation: bool = True
    on_broken: Literal["refuse", "skip"] = "refuse"
    resume: bool = True
    ray: str | None = None


def build(
    source: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SOURCE]")] = None,
    *,
    out: Path,
    from_embeddings: Path | None = None,
    rows: Path | None = None,
    embedder: tyro.conf.OmitArgPrefixes[Embedder] = Embedder(),
    reading: tyro.conf.OmitArgPrefixes[Reading] = Reading(),
) -> None:
    """Build an index of all images of a folder or a table, or of existing embeddings.

    A stopped build goes on. If the index at OUT has the same images and image tower, only
    changes are embedded. Any other index at OUT is replaced when the new one is complete.

    Args:
        source: folder of images, read with its subfolders, or csv:FILE or parquet:FILE with paths
            of images; not with --from-embeddings.
        out: folder of the index, such as indexes/photos; radapter-serve serves the indexes in
            ./indexes.
        from_embeddings: .npy file of embeddings from the release's image encoder, floats [N, D];
            each is made unit length, and no image is read. Needs --rows.
        rows: .parquet or .csv with one row for each embedding, in their order: ids such as paths in
            the column --image-column, and metadata.
        embedder: the release that embeds the images.
        reading: how the images are read and kept.
    """
    from radapter_serve.index.build import build, build_from_embeddings
    from radapter_serve.release.repository import split_repository

    if (source is None) == (from_embeddings is None):
        raise RAdapterError("give a SOURCE of images, or --from-embeddings FILE.npy")
    if (rows is None) != (from_embeddings is None):
        raise RAdapterError("--from-embeddings FILE.npy and --rows TABLE go together")
    doing = "embedding" if source else "writing"
    with embedder.loaded() as loaded, _progress(doing) as progress:
        if source is not None:
            summary = build(source, out, loaded, **vars(reading), progress=progress)
        else:
            assert from_embeddings is not None
            assert rows is not None
            options: dict[str, Any] = {"resume": reading.resume, "progress": progress}
            options["image_column"] = reading.image_column
            summary = build_from_embeddings(from_embeddings, rows, out, loaded, **options)
    _print_summary(summary, out)

    # Print the commands that serve the index and search it.
    repository, number = split_repository(embedder.model_repository)
    serve = "radapter-serve"
    if repository != "model_repository":
        serve += f" {shlex.quote(repository)}"
    serve += f" --indexes {shlex.quote(str(out.parent))}"
    search = f'radapter-query search "a red bicycle" --index {shlex.quote(out.absolute().name)}'
    if embedder.url:
        serve = f"the server needs --indexes {shlex.quote(str(out.parent))}"
        search += f" --url {shlex.quote(embedder.url)}"
    elif number:
        search += f" --release {number}"
    print(f"\nserve it:   {serve}\nsearch it:  {search}")


def add(
    source: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SOURCE]")] = None,
    *,
    out: Path,
    model_repository: str | None = None,
    url: str | None = None,
    prune: bool = False,
    on_broken: Literal["refuse", "skip"] | None = None,
) -> None:
    """Add new and changed images; the others are not embedded again.

    Args:
        source: folder or table to look in; the index's own source if not given.
        out: folder of the index.
        model_repository: its served release embeds the images; DIR@N for release N. It must be the
            release that made the index, which is found automatically if neither a repository nor a
            server is given.
        url: a live server that embeds the images instead.
        prune: remove images whose files are gone.
        on_broken: refuse stops the addition at an image that can't be read; skip leaves it out, and
            names it in OUT/broken.txt; as in the build if not given.
    """
    from radapter_serve.encoders.loaded import release_at
    from radapter_serve.index.build import add
    from radapter_serve.index.index import current
    from radapter_serve.release.repository import releases_with_images, split_repository

    plan = current(out)[1].plan
    origin = plan.origin
    version = None
    made_by = plan.release
    # A release in fp32 is computed in bf16 again; another precision is that of its export.
    precision = "bf16" if made_by.precision == "bf16" else None
    repository, _ = split_repository(origin.get("model_repository", ""))
    if url:
        origin = {"url": url}
    elif model_repository:
        origin = {"model_repository": model_repository}
    elif repository:
        versions = releases_with_images(
            Path(repository), made_by.image_digest, made_by.alpha, precision
        )
        if versions:
            origin = {"model_repository": repository}
            version = max(versions)
    with closing(release_at(origin, version, precision)) as loaded:
        _print_embedder(loaded)
        with _progress("embedding") as progress:
            summary = add(out, loaded, source, prune=prune, on_broken=on_broken, progress=progress)
    _print_summary(summary, out)


def map_(
    out: tyro.conf.Positional[Path],
    *,
    embedder: tyro.conf.OmitArgPrefixes[Embedder] = Embedder(),
    min_recall: float = 0.8,
    embed: bool = False,
) -> None:
    """Map an index of another release to this one's image tower, instead of embedding all images.

    A sample of 1,000 images is embedded, and a linear map from the old embeddings to the new ones
    maps all others. The command prints how many of the ten nearest a search finds (recall@10),
    among images that the map was not fitted on. `radapter-index build` embeds all images when you
    give it, and the mapped index is searched until it is complete.

    Args:
        out: folder of the index.
        embedder: the release that embeds the sample.
        min_recall: least recall@10 with images and with texts, from 0 to 1; the index stays as it
            is if it is lower.
        embed: then embed all images, and replace the mapped index when that is complete.
    """
    from radapter_serve.index.build import build
    from radapter_serve.index.index import current
    from radapter_serve.index.mapping import map_index

    with embedder.loaded() as loaded:
        with _progress("embedding") as progress:
            mapped = map_index(out, loaded, min_recall=min_recall, progress=progress)
        plan = current(out)[1].plan
        print(f"{out}: mapped {_mapped(mapped)}")
        if not embed:
            print(f"\nembed all images:   {plan.command(out, loaded)}")
            return
        with _progress("embedding") as progress:
            summary = build(
                plan.source,
                out,
                loaded,
                image_column=plan.image_column,
                thumbnails=plan.thumbnails,
                exif_orientation=plan.exif_orientation,
                on_broken=plan.on_broken,
                progress=progress,
            )
    _print_summary(summary, out)


def _mapped(mapped: Mapped) -> str:
    made_by = mapped.release
    return (
        f"from {made_by.architecture} at alpha {made_by.alpha:g}, release {made_by.version}:"
        f" recall@10 {mapped.by_image:.2f} with images, {mapped.by_text:.2f} with texts, among"
        f" {mapped.sample:,} images that were held out"
    )


def info(out: tyro.conf.Positional[Path]) -> None:
    """Show the contents of an index, and the release that made it.

    Args:
        out: folder of the index.
    """
    from radapter_serve.index.index import current

    generation, facts = current(out)
    plan = facts.plan
    size = sum(path.stat().st_size for path in (out / generation).rglob("*") if path.is_file())
    rows = {
        "images": f"{facts.count:,}",
        "search": (
            f"approximate, recall@10 {facts.nearest.recall:.3f}" if facts.nearest else "exact"
        ),
        "columns": ", ".join(facts.columns),
        "mapped": "" if facts.mapped is None else _mapped(facts.mapped),
        "release": (
            f"{plan.release.architecture} at alpha {plan.release.alpha:g}, {plan.release.precision}"
        ),
        "image tower": plan.release.image_digest,
        "made by": " ".join(plan.origin.values()),
        "source": f"{plan.source}, {plan.rows}" if plan.rows else plan.source,
        "ids start from": plan.root,
        "size": f"{size / 1e6:.1f} MB",
        "created": facts.created,
        "changed": facts.changed,
    }
    for name, value in rows.items():
        if value:
            print(f"{name:<16}{value}")


def verify(out: tyro.conf.Positional[Path]) -> int:
    """Compare an index with its digests and with its images; exits with 1 if they differ.

    Args:
        out: folder of the index.
    """
    from radapter_serve.index.build import verify
    from radapter_serve.index.index import current

    with _progress("reading") as progress:
        result = verify(out, progress=progress)
    update = f"radapter-index add --out {shlex.quote(str(out))}"
    for name, ids, hint in (
        ("file gone", result.missing, f"{update} --prune removes them"),
        ("file changed", result.changed, f"{update} embeds them again"),
        ("not in the index", result.new, f"{update} adds them"),
    ):
        if ids:
            print(f"{name}: {len(ids)}; {hint}")
            print("".join(f"  {id}\n" for id in ids[:_NAMED]), end="")
            if len(ids) > _NAMED:
                print(f"  ... and {len(ids) - _NAMED} more")
    if not result.ok:
        return 1
    alpha = current(out)[1].plan.release.alpha
    print(f"the index, at alpha {alpha:g}, and the files agree")
    return 0


def publish(out: tyro.conf.Positional[Path], to: tyro.conf.Positional[str]) -> None:
    """Publish an index to Qdrant, replacing the one there atomically.

    The API key comes from the environment: RADAPTER_QDRANT_API_KEY or QDRANT_API_KEY.

    Args:
        out: folder of the index.
        to: address in a running Qdrant, such as qdrant://localhost:6333/photos (qdrants:// for
            TLS).
    """
    check_installed("qdrant_client", "qdrant")
    from radapter_serve.index.qdrant import publish

    with _progress("publishing") as progress:
        published = publish(out, to, progress)
    print(f"{to}: {'published' if published else 'up to date'}")
    print(
        f"\nserve it:   radapter-index link {shlex.quote(to)} --out"
        f" indexes/{shlex.quote(to.rstrip('/').rpartition('/')[2])}"
    )


def link(url: tyro.conf.Positional[str], out: Path) -> None:
    """Make a folder that links to an index in Qdrant, for a server to search.

    Args:
        url: address of the published index, such as qdrant://localhost:6333/photos.
        out: folder to make, such as indexes/photos.
    """
    check_installed("qdrant_client", "qdrant")
    from radapter_serve.index.qdrant import link

    link(url, out)
    print(f"{out} links to {url}")


COMMANDS: dict[str, Any] = {
    "build": build,
    "add": add,
    "map": map_,
    "info": info,
    "verify": verify,
    "publish": publish,
    "link": link,
}


def main(argv: Sequence[str] | None = None) -> int:
    signals: list[int] = []

    def stop(number: int, _: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    # SIGTERM acts as Ctrl-C, but for its exit status.
    with handled(stop, signal.SIGTERM):
        status = run(COMMANDS, argv, prog=PROG, first=FIRST, description=DESCRIPTION)
    return 128 + signals[0] if signals else status


def _print_embedder(loaded: LoadedRelease) -> None:
    facts = loaded.release
    (place,) = loaded.origin.values()
    print(
        f"release {facts.version} of {place} embeds: {facts.architecture} at alpha {facts.alpha:g},"
        f" {facts.precision}"
    )


@contextmanager
def _progress(description: str) -> Iterator[Any]:
    columns = (
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_summary(summary: Any, out: Path) -> None:
    parts = [f"{summary.embedded:,} embedded"] if summary.embedded or summary.kept else []
    for number, what in (
        (summary.kept, "there before"),
        (summary.removed, "removed"),
        (summary.copies, "with the same bytes as another"),
        (summary.repeated, "rows left out, as an earlier one names the same image"),
    ):
        if number:
            parts.append(f"{number:,} {what}")
    state = "" if summary.changed else "up to date, "
    print(f"{out}: {state}{summary.count:,} images" + (f" ({', '.join(parts)})" if parts else ""))
    if summary.left_out:
        from radapter_serve.contract.images import SUFFIXES, count_kinds

        count = sum(summary.left_out.values())
        print(
            f"left out, as an index takes only {', '.join(SUFFIXES)}: {count:,} files"
            f" ({count_kinds(summary.left_out)})"
        )
    if summary.broken:
        broken = shlex.quote(str(out / "broken.txt"))
        print(f"{len(summary.broken):,} images can't be read, see {broken}")
    if summary.recall is not None:
        print(f"approximate search, recall@10 {summary.recall:.3f}")
