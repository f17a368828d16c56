"""An index in a folder: generations next to each other, and a pointer that names the one that
counts.

`index.json` in the folder names the generation, a folder `g-...` in it, which holds an `index.json`
with the facts, the LanceDB table that is written to, and the files that a search maps. A generation
never changes; to replace `index.json` is to replace the index.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import as_text, staged
from radapter_serve.index.facts import FACTS, IndexFacts, Plan, build_command
from radapter_serve.index.integrity import DamagedFileError, check_files
from radapter_serve.index.mapped import FOLDER as SEARCHED
from radapter_serve.index.store import TABLE
from radapter_serve.index.store.table import Table

GENERATION = "generation"
_CHANGING = "latest_version_hint.json"  # the one file that LanceDB writes again


class Folder:
    """A folder of generations.

    Args:
        folder: of the index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def current(self) -> tuple[str, IndexFacts]:
        path = self._folder / FACTS
        try:
            pointer = json.loads(path.read_bytes())
            generation = pointer[GENERATION]
            if not is_generation(generation):
                raise ValueError(f"it names the generation {generation!r:.40}")
            path = self._folder / generation / FACTS
            return generation, IndexFacts.from_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            where = shlex.quote(str(self._folder))
            raise RAdapterError(
                f"no index at {self._folder}; make one: radapter-index build PHOTOS --out {where}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RAdapterError(
                f"{path} can't be read ({reason(error)}); build it again: {self._build_command()}"
            ) from None

    def _build_command(self) -> str:
        """What builds an index again whose facts can't be read, from its source where that can."""
        source = "SOURCE"
        generation = pointed(self._folder) or ""
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
        ):
            values = json.loads((self._folder / generation / FACTS).read_bytes())
            source = shlex.quote(values.get("plan", values)["source"])
        return build_command(self._folder).replace("SOURCE", source, 1)

    def open(self, generation: str, facts: IndexFacts, *, complete: bool) -> Table:
        place = self._folder / generation
        with table_errors(self._folder, facts.plan):
            if complete:
                check_files(place / f"{TABLE}.lance", facts.files, complete=True)
            try:
                return Table(as_text(self._folder.name), place / SEARCHED, facts, complete=complete)
            except (RAdapterError, DamagedFileError) as error:
                mend = f"radapter-index add --out {shlex.quote(str(self._folder))}"
                raise RAdapterError(
                    f"the index {self._folder} can't be searched: {error}; mend it: {mend}"
                ) from None


def is_generation(name: Any) -> bool:
    """Whether a name is that of a generation."""
    return (
        isinstance(name, str)
        and len(name) == 18
        and name.startswith("g-")
        and name[2:].isalnum()
        and name.isascii()
    )


def generation_of(facts: str) -> str:
    """The name of the generation with these facts."""
    return f"g-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def generations_of(folder: Path) -> list[Path]:
    """The generations that a folder holds, whichever counts."""
    return (
        [path for path in folder.iterdir() if is_generation(path.name)] if folder.is_dir() else []
    )


def install(made: Path, folder: Path, facts: IndexFacts, keep: datetime.timedelta) -> Path:
    """Make a finished folder the generation that counts; a reader meanwhile finds this one or
    the one before.

    Args:
        made: the finished folder, on the same disk; its `index.json` is written here.
        folder: of the index.
        facts: of the generation.
        keep: how long after it was replaced a generation stays, for those who read it.

    Returns:
        The folder of the generation.
    """
    text = facts.to_json()
    generation = generation_of(text)
    _write(made / FACTS, text)
    folder.mkdir(exist_ok=True)
    before = pointed(folder)
    shutil.rmtree(folder / generation, ignore_errors=True)
    made.rename(folder / generation)
    _write(folder / FACTS, json.dumps({GENERATION: generation}))
    if before is not None:
        with contextlib.suppress(OSError):
            os.utime(folder / before)
    for place in generations_of(folder):
        with contextlib.suppress(OSError):
            replaced = datetime.datetime.fromtimestamp(place.stat().st_mtime)
            if place.name != generation and datetime.datetime.now() - replaced > keep:
                shutil.rmtree(place)
    return folder / generation


def pointed(folder: Path) -> str | None:
    """The generation that a folder names, whether it is there or not; None where it names none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        generation = json.loads((folder / FACTS).read_bytes())[GENERATION]
        return generation if is_generation(generation) else None
    return None


def link_copy(table: Path, target: Path) -> None:
    """A copy of a LanceDB table that shares its files where the disk can, for they never change."""

    def link(source: str, name: str) -> None:
        if not source.endswith(_CHANGING):
            with contextlib.suppress(OSError):
                os.link(source, name)
                return
        shutil.copy2(source, name)

    shutil.copytree(table, target, copy_function=link)


@contextlib.contextmanager
def table_errors(folder: Path, plan: Plan | None = None) -> Iterator[None]:
    """Turn LanceDB's errors, which have no common base, into one for people.

    Args:
        folder: of the index.
        plan: of the index, which names the command that mends it.
    """
    try:
        yield
    except RAdapterError:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, DamagedFileError) else short_reason(error)
        again = f"build it again: {build_command(folder, plan)} --no-resume"
        raise RAdapterError(f"the index {folder} can't be used: {why}; {again}") from error


def short_reason(error: BaseException) -> str:
    """The first line of LanceDB's error, without the paths of its source."""
    return re.sub(r"(, /\S+\.rs.*| \(code=.*)$", "", reason(error))[:300].removeprefix(
        "Invalid input, "
    )


def _write(path: Path, text: str) -> None:
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
