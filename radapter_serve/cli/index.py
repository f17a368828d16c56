"""radapter-index: make an index of images for `retrieve`, keep it up to date, and look into it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from radapter_serve.cli import guard
from radapter_serve.errors import RAdapterError

PROG = "radapter-index"
_NAMED = 10  # ids that a list shows


def build(
    source: tyro.conf.Positional[str],
    out: Path,
    model_repository: str = "model_repository",
    url: str | None = None,
    alpha: float | None = None,
    image_column: str = "image",
    thumbnails: int = 128,
    on_broken: Literal["refuse", "skip"] = "refuse",
    resume: bool = False,
) -> None:
    """Make an index of all images of a folder or a table; one that stands there is replaced when this one is complete.

    Args:
        source: folder of images, read with all folders in it, csv:FILE or parquet:FILE with paths of images.
        out: folder of the index, such as indexes/photos; radapter-serve serves what is in ./indexes.
        model_repository: whose newest release embeds; DIR@N for release N.
        url: a live server that embeds instead, such as grpc://localhost:8001.
        alpha: re-scaling from 0 to 1 of images and, later, queries, of a release that takes any (radapter-export
            --alpha dynamic); the release's own if none is given.
        image_column: column of a table that holds the paths; the others become metadata.
        thumbnails: longer side in px at most; 0 for none.
        on_broken: an image that can't be read stops the build, or is skipped and named in OUT/broken.txt.
        resume: go on with a build that was stopped, without embedding again what it has.
    """
    from radapter_serve.index.build import build

    with _release(model_repository, url) as release, _progress("embedding") as progress:
        if alpha is not None:
            release.dial(alpha)
        summary = build(
            source,
            out,
            release,
            image_column=image_column,
            thumbnails=thumbnails,
            on_broken=on_broken,
            resume=resume,
            progress=progress,
        )
    _show(summary, out)
    print(f"\nserve it:   radapter-serve --indexes {out.parent}")
    print(f'search it:  radapter-query search "a red bicycle" --index {out.name}')


def add(
    source: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SOURCE]")] = None,
    *,
    out: Path,
    model_repository: str = "model_repository",
    url: str | None = None,
    prune: bool = False,
    on_broken: Literal["refuse", "skip"] = "refuse",
) -> None:
    """Add what is new or has changed; what is there unchanged is not embedded again.

    Args:
        source: where to look; the source that the index was made of if none is given.
        out: folder of the index.
        model_repository: whose newest release embeds, the one that made the index; DIR@N for release N.
        url: a live server that embeds instead.
        prune: remove images whose files are gone.
        on_broken: an image that can't be read stops this, or is skipped and named in OUT/broken.txt.
    """
    from radapter_serve.index.build import add

    with _release(model_repository, url) as release, _progress("embedding") as progress:
        summary = add(out, release, source, prune=prune, on_broken=on_broken, progress=progress)
    _show(summary, out)


def info(out: tyro.conf.Positional[Path]) -> None:
    """Show what an index holds, and which release made it.

    Args:
        out: folder of the index.
    """
    from radapter_serve.index.index import read_facts

    facts = read_facts(out)
    release, engine = facts["release"], facts["engine"]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    approximate = f"{engine['index']}, recall@10 {engine['recall']:.3f}" if "index" in engine else "exact"
    rows = {
        "images": f"{facts['count']:,}",
        "search": approximate,
        "columns": ", ".join(facts["columns"]),
        "release": f"{release['architecture']} at alpha {release['alpha']:g}, {release['precision']}",
        "digest": facts["release_digest"],
        "source": facts["source"],
        "ids start from": facts["root"],
        "size": f"{size / 1e6:.1f} MB",
        "created": facts["created"],
        "changed": facts["changed"],
    }
    for name, value in rows.items():
        print(f"{name:<16}{value}")


def verify(out: tyro.conf.Positional[Path]) -> int:
    """Compare an index with the files that it was made of; exits with 1 where they differ.

    Args:
        out: folder of the index.
    """
    from radapter_serve.index.build import verify

    with _progress("reading") as progress:
        found = verify(out, progress=progress)
    for name, ids, hint in (
        ("file gone", found.missing, f"radapter-index add --out {out} --prune removes them"),
        ("file changed", found.changed, f"radapter-index add --out {out} embeds them again"),
        ("not in the index", found.new, f"radapter-index add --out {out} adds them"),
        ("embedding damaged", found.damaged, "build the index again"),
    ):
        if ids:
            print(f"{name}: {len(ids)}; {hint}")
            print("".join(f"  {id}\n" for id in ids[:_NAMED]), end="")
            if len(ids) > _NAMED:
                print(f"  ... and {len(ids) - _NAMED} more")
    if found.ok:
        print(f"the index, at alpha {found.alpha:g}, and the files agree")
    return 0 if found.ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `radapter-index`."""
    commands: dict[str, Any] = {"build": build, "add": add, "info": info, "verify": verify}
    return guard(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog=PROG), prog=PROG)


@contextmanager
def _release(model_repository: str, url: str | None) -> Iterator[Any]:
    """What embeds."""
    if url is None:
        from radapter_serve.runtimes.local_release import LocalRelease

        yield LocalRelease(model_repository)
        return
    from radapter_client import RAdapterClientError
    from radapter_serve.runtimes.served_release import ServerRelease, connect

    client, release = connect(url)
    try:
        with client:
            yield ServerRelease(client, release.facts)
    except RAdapterClientError as error:
        raise RAdapterError(f"{url}: {error}") from error


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(summary: Any, out: Path) -> None:
    parts = [f"{summary.embedded:,} embedded"]
    for number, what in (
        (summary.kept, "there before"),
        (summary.removed, "removed"),
        (summary.copies, "with the same bytes as another"),
        (summary.repeated, "rows left out, for an earlier one names the same image"),
    ):
        if number:
            parts.append(f"{number:,} {what}")
    print(f"{out}: {summary.count:,} images ({', '.join(parts)})")
    if summary.broken:
        print(f"{len(summary.broken):,} images can't be read, see {out / 'broken.txt'}")
    if summary.recall is not None:
        print(f"approximate search, recall@10 {summary.recall:.3f}")


if __name__ == "__main__":
    sys.exit(main())
