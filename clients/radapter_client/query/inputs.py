"""What a command is given: lists of labels, and images as files and folders."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from .._exceptions import InvalidImage, RAdapterClientError
from .._images import is_image_file, list_images

T = TypeVar("T")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file that are neither empty nor `#` comments."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RAdapterClientError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise RAdapterClientError(f"{path} is empty: it needs {what} a line")
    return lines


def read_examples(folder: Path) -> dict[str, list[str]]:
    """The images in each folder of a folder, by its name.

    Raises:
        RAdapterClientError: there is no folder in it, or one without images.
    """
    try:
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise RAdapterClientError(f"cannot read {folder}: {error.strerror}") from error
    folders = [path for path in folders if not path.name.startswith(".")]
    if not folders:
        raise RAdapterClientError(f"{folder} has no folders: it needs one for each label")
    return {path.name: list(list_images(path)) for path in folders}


def read_weights(
    given: Sequence[str], examples: Mapping[str, Any]
) -> float | dict[str, float] | None:
    """The weight of examples beside texts, for all labels or by label.

    Args:
        given: such as `0.7` and `a mug=0.9`.
        examples: by label.

    Raises:
        RAdapterClientError: one is no number, or given twice.
    """
    common: float | None = None
    by_label: dict[str, float] = {}
    for text in given:
        label, equals, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            raise RAdapterClientError(
                f"--example-weight {text}: write a number from 0 to 1, or LABEL=NUMBER"
            ) from None
        if label in by_label or (not equals and common is not None):
            raise RAdapterClientError(f"--example-weight {text}: this weight is given twice")
        if equals:
            by_label[label] = weight
        else:
            common = weight
    if not by_label:
        return common
    others = {} if common is None else dict.fromkeys(examples, common)
    return {**others, **by_label}


class ImageFiles:
    """Images as a command is given them: files, and folders with all the images in them, in the
    order of their names.

    Args:
        names: of files and folders.

    Raises:
        RAdapterClientError: there is no image.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.paths: list[str] = []
        self.left_out = False
        self._found: set[str] = set()  # in folders
        others: Counter[str] = Counter()
        for name in names:
            if not Path(name).is_dir():
                self.paths.append(name)
                continue
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            images = [str(path) for path in files if is_image_file(path)]
            others.update(
                path.suffix.lower() or path.name for path in files if not is_image_file(path)
            )
            self.paths += images
            self._found |= set(images)
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
            _note(f"files that are no JPEG, PNG or WebP are left out: {kinds}")
        if not self.paths:
            raise RAdapterClientError(
                f"no JPEG, PNG or WebP files: {', '.join(names) or 'give files or folders'}"
            )

    @property
    def one(self) -> bool:
        """Whether it is one file that was given as such."""
        return len(self.paths) == 1 and not self._found

    def relative(self, path: str) -> str:
        """The path of an image below the folder that holds all of them."""
        folder = os.path.commonpath([Path(path).absolute().parent for path in self.paths])
        return str(Path(path).absolute().relative_to(folder))

    def answers(self, ask: Callable[[list[str]], list[T]], at_once: int) -> Iterator[tuple[str, T]]:
        """Each image with its answer; an image of a folder that cannot be read is left out, with a
        note.

        Args:
            ask: the answers for some images.
            at_once: how many images to ask for at once.
        """
        runs = [self.paths[start : start + at_once] for start in range(0, len(self.paths), at_once)]
        console = Console(stderr=True)
        quiet = len(runs) == 1 or not sys.stderr.isatty()
        for run in track(runs, "asking", console=console, transient=True, disable=quiet):
            yield from self._answers(run, ask)

    def _answers(
        self, run: list[str], ask: Callable[[list[str]], list[T]]
    ) -> Iterator[tuple[str, T]]:
        try:
            found = ask(run)
        except InvalidImage as error:
            if len(run) > 1:  # one by one, to see which
                for path in run:
                    yield from self._answers([path], ask)
                return
            named = str(error) if run[0] in str(error) else f"{run[0]}: {error}"
            if run[0] not in self._found:
                raise InvalidImage(named, code=error.code) from error
            self.left_out = True
            _note(f"left out: {named}")
            return
        yield from zip(run, found, strict=True)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
