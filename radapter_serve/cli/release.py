"""radapter-release: the releases of a model repository: which there are, and whether they are as they were exported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from radapter_serve.cli import guard
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.repository import releases_of

PROG = "radapter-release"


def verify(
    release: Annotated[tyro.conf.Positional[int | None], tyro.conf.arg(metavar="[N]")] = None,
    *,
    model_repository: Path = Path("model_repository"),
) -> None:
    """Compare the files of releases with the digests of their export, and check their configs. Needs no server.

    Args:
        release: number of the release; all that there are if none is given.
        model_repository: folder that radapter-export has filled.
    """
    versions = _known(model_repository, [] if release is None else [release]) or releases_of(model_repository)
    console = Console(stderr=True)
    with console.status("reading") as status:
        without = check(model_repository, versions, status.update)
    for version in versions:
        print(f"release {version}: " + ("has no digests" if version in without else "as it was exported"))
    if without:
        print(no_digests(without))


def no_digests(versions: Sequence[int]) -> str:
    """What to say of releases of earlier versions."""
    which = f"{'releases' if len(versions) > 1 else 'release'} {', '.join(map(str, versions))}"
    return f"no digests of {which}, so its files could not be checked; an export of today writes digests"


def _known(repository: Path, versions: Sequence[int]) -> list[int]:
    found = releases_of(repository)
    if not found:
        raise RAdapterError(f"no release in the model repository {repository}; make one with: radapter-export")
    for version in versions:
        if version not in found:
            raise RAdapterError(f"no release {version} in {repository}; it holds {', '.join(map(str, found))}")
    return list(versions)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `radapter-release`."""
    commands: dict[str, Any] = {"verify": verify}
    return guard(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog=PROG), argv, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
