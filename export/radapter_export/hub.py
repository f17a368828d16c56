"""Releases on the Hugging Face hub: sent there, and taken back as a model repository.

A release travels as data alone: graphs, samples, tokenizer, label sets and facts. The configs
and the code of its models are made anew where it arrives, so nothing of the hub's is run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radapter_export.repository import Repository
from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.files import digest_of
from radapter_serve.hub import (
    CARD,
    HUB,
    from_hub_or_cache,
    how_to_bring,
    is_absence,
    refused,
    split_revision,
    unreachable,
)
from radapter_serve.release.agreement import SAMPLES
from radapter_serve.release.integrity import SUMS, load_sums, written_sums
from radapter_serve.release.release import FILE, TASKS, Release
from radapter_serve.release.repository import ENCODERS, MODELS, PATCH_ENCODER, TENSORRT, releases_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# folders of a repository on the hub
RELEASE = "release"
TRANSFORMERS = "transformers"
BUILT = "radapter"  # beside `snapshots` in the cache, where nothing of the hub is written
TOKENIZER = "tokenizer.json"
LABEL_SETS = "label_sets"
_GRAPH = ("model.onnx", "model.onnx.data", SAMPLES)
_TOKENIZED = ("embed_text", "segment", "classify")
_LABELLED = ("segment", "classify")
_ALLOWED = re.compile(
    rf"(?:{'|'.join(ENCODERS)})/(?:{'|'.join(map(re.escape, _GRAPH))})"
    rf"|{FILE}|{TOKENIZER}|{LABEL_SETS}/[^/]+\.npz"
)
_MAX_VERSION = 2**31 - 1


@dataclass(frozen=True)
class Hub:
    """A repository of the hub that a release is sent to.

    Attributes:
        name: `ORGANISATION/NAME`.
        api: of the hub.
    """

    name: str
    api: HfApi

    @classmethod
    def open(cls, name: str) -> Hub:
        """Make sure that the repository is there and may be written; a new one is private.

        Args:
            name: `ORGANISATION/NAME`, or `NAME` for the own account.

        Raises:
            RAdapterError: no token, no such name, or a hub that refuses.
        """
        from huggingface_hub import HfApi, get_token

        repository, revision = split_revision(name)
        if revision is not None:
            raise RAdapterError(
                f"--push {name} names a revision, and a push makes a new one; leave out @{revision}"
            )
        if get_token() is None:
            raise RAdapterError(
                f"--push {name} needs a token of the Hugging Face hub that may write; run: hf auth"
                " login"
            )
        api = HfApi()
        with _refusals(f"could not push to {repository}", "nothing was exported"):
            made = api.create_repo(repository, private=True, exist_ok=True)
        return cls(made.repo_id, api)

    def push(self, files: Mapping[str, Path | bytes], release: Release, where: str) -> str:
        """Send files in one commit: all of them or none.

        What an earlier release left in `release/` or `transformers/` goes with the same commit.

        Args:
            files: by their names in the repository.
            release: that they are of.
            where: the export is, for a message.

        Returns:
            `hf-hub:NAME@COMMIT`, by which it can be taken back.

        Raises:
            RAdapterError: the hub refuses.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with _refusals(
            f"could not push to {self.name}",
            f"nothing of it was sent, and the export is complete in {where}",
        ):
            there = self.api.list_repo_files(self.name)
            gone = [
                name
                for name in there
                if name.startswith((f"{RELEASE}/", f"{TRANSFORMERS}/")) and name not in files
            ]
            made = self.api.create_commit(
                self.name,
                [
                    *(CommitOperationAdd(name, file) for name, file in files.items()),
                    *(CommitOperationDelete(name) for name in gone),
                ],
                commit_message=f"{release.architecture} at alpha {release.alpha:g}, by"
                " radapter-export",
            )
        return f"{HUB}{self.name}@{made.oid}"


def check_push(name: str, alphas: int, runtime: str) -> None:
    """Refuse what can't be pushed, before anything is loaded.

    Raises:
        RAdapterError: several releases, or one that runs on one kind of GPU alone.
    """
    if alphas > 1:
        raise RAdapterError(
            f"--push {name} sends one release, and --alpha names {alphas}; export and push each"
            " by itself"
        )
    if runtime == TENSORRT:
        raise RAdapterError(
            f"--push {name} sends graphs, and an engine of TensorRT is for one kind of GPU; leave"
            " out --format and --runtime, and run radapter-build-engine where it is served"
        )


def files_of(
    repository: Path,
    release: Release,
    merged: Path,
    transformers: Path | None,
    card: str | None,
) -> dict[str, Path | bytes]:
    """What is sent of a release, by the names that it has on the hub.

    Args:
        repository: that holds the release.
        release: its facts.
        merged: folder of its checkpoint.
        transformers: folder of the same for that library, or None.
        card: text of the model card, or None for none.
    """
    files: dict[str, Path | bytes] = _inside(merged, "", without=(CARD,))
    if transformers is not None:
        files |= _inside(transformers, f"{TRANSFORMERS}/", without=(CARD, FILE))
    if card is not None:
        files[CARD] = card.encode()
    data = _data_of(repository, release.version)
    files |= {f"{RELEASE}/{name}": path for name, path in data.items()}
    sums = written_sums({name: digest_of(file) for name, file in data.items()})
    files[f"{RELEASE}/{SUMS}"] = sums
    return files


def take(name: str) -> Path | None:
    """The release of a repository on the hub as a model repository in the cache.

    It is fetched where the cache lacks it, its files are compared with their digests, and the
    configs of its models are written. It lies outside the snapshot, which may hold any file of
    the hub.

    Args:
        name: `hf-hub:ORGANISATION/NAME`, or with `@REVISION`: a branch, a tag or a commit.

    Returns:
        Folder of a model repository; None where there is no release on the hub.

    Raises:
        RAdapterError: the hub refuses or can't be reached and the cache lacks it, a file is not as
            it was pushed, or the cache can't be written.
    """
    folder = _fetch(name)
    data = folder / RELEASE
    if not (data / FILE).is_file():
        return None
    built = folder.parents[1] / BUILT
    target = built / folder.name  # the commit
    if releases_of(target):  # from last time; whoever opens it checks its files
        return target
    sums = _verified(name, data)
    release = Release.load(data)
    _check_facts(name, release)
    try:
        built.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built, prefix=".") as scratch:
            made = Path(scratch, "made")
            _lay_out(data, sums, release, made)
            try:
                made.rename(target)
            except OSError:
                if not releases_of(target):  # by another process, which was faster
                    raise
    except OSError as error:
        raise RAdapterError(
            f"cannot write to {built}, where {name} is built: {reason(error)}; set HF_HOME to a"
            " folder that can be written"
        ) from error
    return target


def taken(name: str) -> Path:
    """As `take`, where nothing but a release will do.

    Raises:
        RAdapterError: also where there is no release.
    """
    folder = take(name)
    if folder is None:
        raise RAdapterError(
            f"{name} holds no release; export one from it with radapter-export --checkpoint"
            f" {name}, or push one with radapter-export --push"
        )
    return folder


@contextlib.contextmanager
def _refusals(what: str, so: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub and the network raise many kinds
        raise RAdapterError(f"{what}: {refused(error)} ({so})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning where a repository holds another kind of model, which is no mistake."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _inside(folder: Path, at: str, without: tuple[str, ...]) -> dict[str, Path | bytes]:
    """The files of a folder by their names on the hub, where the card is another one."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {f"{at}{path.name}": path for path in files if path.name not in without}


def _data_of(repository: Path, version: int) -> dict[str, Path]:
    """The data of a release, each file once, by the names that it travels under."""
    task = repository / MODELS[-1] / str(version)
    found = {FILE: task / FILE, TOKENIZER: task / TOKENIZER}
    found |= {f"{LABEL_SETS}/{path.name}": path for path in (task / LABEL_SETS).glob("*.npz")}
    for encoder in ENCODERS:
        for name in _GRAPH:
            path = repository / encoder / str(version) / name
            if path.is_file():
                found[f"{encoder}/{name}"] = path
    return found


def _fetch(name: str) -> Path:
    """The folder of the cache that holds the release of a repository."""
    check_installed("huggingface_hub", "server")
    from huggingface_hub import constants, snapshot_download

    repository, revision = split_revision(name)
    try:
        with from_hub_or_cache(), _quiet():
            return Path(
                snapshot_download(repository, revision=revision, allow_patterns=[f"{RELEASE}/*"])
            )
    except Exception as error:  # the hub and the network raise many kinds
        if unreachable() and is_absence(error):
            raise RAdapterError(
                f"{name} is not on this machine, and the Hugging Face hub can't be reached"
                f" ({unreachable()}); {how_to_bring(repository, folder=RELEASE)}"
            ) from error
        raise RAdapterError(
            f"could not get {name} from {constants.ENDPOINT}: {refused(error)}"
        ) from error


def _verified(name: str, data: Path) -> dict[str, str]:
    """The digests of a release that came from the hub, once all of its files have them.

    Raises:
        RAdapterError: names what differs.
    """
    if not (data / SUMS).is_file():
        raise _differs(name, [f"{SUMS}, the list of its digests, is missing"])
    sums = load_sums(data / SUMS)
    sums = {file: digest for file, digest in sums.items() if file != SUMS}
    found = {path.relative_to(data).as_posix(): path for path in data.rglob("*") if path.is_file()}
    found.pop(SUMS)
    problems = []
    for file in sorted({*sums, *found}):
        if not _ALLOWED.fullmatch(file):
            problems.append(f"{file} is no part of a release")
        elif file not in found:
            problems.append(f"{file} is missing")
        elif file not in sums:
            problems.append(f"{file} has no digest")
        elif digest_of(found[file]) != sums[file]:
            problems.append(f"{file} differs")
    needed = {FILE, TOKENIZER, *(f"{one}/{_GRAPH[0]}" for one in ENCODERS if one != PATCH_ENCODER)}
    problems += [f"{file} is missing" for file in sorted(needed - {*sums, *found})]
    if problems:
        raise _differs(name, problems)
    return sums


def _differs(name: str, problems: list[str]) -> RAdapterError:
    repository, _ = split_revision(name)
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return RAdapterError(
        f"{name} is not as it was pushed: {'; '.join(problems[:5])}{more}; fetch it again with:"
        f' hf download {repository} --include "{RELEASE}/*" --force-download, or push it again with'
        " radapter-export"
    )


def _check_facts(name: str, release: Release) -> None:
    """Refuse facts of which no config can be made."""
    version = release.version
    allowed = {
        f"version {version!r:.40}": isinstance(version, int) and 0 < version <= _MAX_VERSION,
        f"runtime {release.runtime!r:.40}": release.runtime in ("onnxruntime", "openvino"),
        f"max_batch_size {release.max_batch_size!r:.40}": isinstance(release.max_batch_size, int)
        and 0 < release.max_batch_size <= _MAX_VERSION,
        f"label_sets {release.label_sets!r:.40}": isinstance(release.label_sets, dict)
        and all(isinstance(facts, dict) for facts in release.label_sets.values()),
    }
    for fact, fits in allowed.items():
        if not fits:
            raise RAdapterError(
                f"{name} says {fact}, which no release has that was pushed; push it again with"
                " radapter-export"
            )


def _lay_out(data: Path, sums: Mapping[str, str], release: Release, folder: Path) -> None:
    """Make a model repository of a release's data, with the configs and the code of this
    installation.
    """
    models = [model for model in MODELS if model != PATCH_ENCODER or release.dense]
    version = release.version
    try:
        with Repository(folder, models) as repository:
            for model in models:
                place = repository.staged(model, version)
                place.mkdir()
                for file, target in _files_for(model, sums).items():
                    _link(data / file, place / target)
                if model in TASKS:
                    repository.add_model_file(model, version)
                repository.add_config(model, [release])
            repository.add_sums(version)
            repository.commit([version])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise RAdapterError(
            f"the {FILE} of a release from the hub is broken: {reason(error)}; push it again with"
            " radapter-export"
        ) from error


def _files_for(model: str, sums: Mapping[str, str]) -> dict[str, str]:
    """The files of a model by the names that they travel under, and by those of its folder."""
    if model in ENCODERS:
        return {file: file.rpartition("/")[2] for file in sums if file.startswith(f"{model}/")}
    files = {FILE: FILE}
    if model in _TOKENIZED:
        files[TOKENIZER] = TOKENIZER
    if model in _LABELLED:
        files |= {file: file for file in sums if file.startswith(f"{LABEL_SETS}/")}
    return files


def _link(source: Path, target: Path) -> None:
    """The same file in another place; the cache's own are links, which a runtime may refuse to
    follow.
    """
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)
