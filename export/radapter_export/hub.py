"""Releases on the Hugging Face hub: pushing, and taking a release from there. Only data is taken:
the models' configs and code are those of this installation.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from radapter_export.repository import LABELLED, TOKENIZED, Repository
from radapter_serve.errors import RAdapterError, check_installed, quiet, reason
from radapter_serve.files import digest_of, disk_errors
from radapter_serve.release.agreement import SAMPLES
from radapter_serve.release.integrity import SUMS, differences, load_sums, shown, written_sums
from radapter_serve.release.release import FILE, Release
from radapter_serve.release.repository import ENCODERS, MODELS, PATCH_ENCODER, TENSORRT, releases_of
from radapter_serve.sources import (
    CARD,
    HUB,
    from_hub_or_cache,
    how_to_bring,
    is_absence,
    refused,
    split_revision,
    unreachable,
)

if TYPE_CHECKING:
    from radapter_export.settings import ExportSettings

# Folders of a repository on the hub
RELEASE = "release"
_PATTERN = f"{RELEASE}/*"
BUILT = "radapter"  # in the cache, next to `snapshots`, where no file of the hub is written
TOKENIZER = "tokenizer.json"
TRANSFORMERS = "transformers"  # its folder in a repository on the hub
LABEL_SETS = "label_sets"
_GRAPH = ("model.onnx", "model.onnx.data", SAMPLES)
_ALLOWED = re.compile(
    rf"(?:{'|'.join(ENCODERS)})/(?:{'|'.join(map(re.escape, _GRAPH))})"
    rf"|{FILE}|{TOKENIZER}|{LABEL_SETS}/[^/]+\.npz"
)
_MAX = 2**31 - 1  # largest number that Triton takes


def prepare_push(name: str, alphas: int, runtime: str) -> str:
    """Check, before the export, that a release may be pushed, and create a missing repository,
    which is private; returns its full name.
    """
    from huggingface_hub import HfApi

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
    try:
        repository = HfApi().create_repo(name.removeprefix(HUB), private=True, exist_ok=True)
    except Exception as error:  # the hub and the network raise many kinds of errors
        raise RAdapterError(
            f"could not push to {name}: {refused(error)} (nothing was exported)"
        ) from error
    return repository.repo_id


def push(name: str, release: Release, settings: ExportSettings, card: str) -> str:
    """Push a release in one commit, replacing an earlier one; returns its name and commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    # Collect the data of the release, each file once, and its digests.
    version = str(release.version)
    task = settings.model_repository / MODELS[-1] / version
    data = {FILE: task / FILE, TOKENIZER: task / TOKENIZER}
    data |= {f"{LABEL_SETS}/{path.name}": path for path in (task / LABEL_SETS).glob("*.npz")}
    for encoder in ENCODERS:
        for file in _GRAPH:
            path = settings.model_repository / encoder / version / file
            if path.is_file():
                data[f"{encoder}/{file}"] = path
    sums = {file: digest_of(path) for file, path in data.items()}
    files: dict[str, Path | bytes] = {f"{RELEASE}/{file}": path for file, path in data.items()}
    files[f"{RELEASE}/{SUMS}"] = written_sums(sums)

    # Add the merged weights, the form of transformers, and the card.
    files |= {path.name: path for path in settings.merged.iterdir()}
    if settings.transformers is not None:
        files |= {
            f"{TRANSFORMERS}/{path.name}": path
            for path in settings.transformers.iterdir()
            if path.name not in (CARD, FILE)
        }
    files[CARD] = card.encode()

    api = HfApi()
    try:
        changes: list[CommitOperationAdd | CommitOperationDelete] = []
        for file in api.list_repo_files(name):
            if file.startswith((f"{RELEASE}/", f"{TRANSFORMERS}/")) and file not in files:
                changes.append(CommitOperationDelete(file))
        changes += [CommitOperationAdd(file, content) for file, content in sorted(files.items())]
        message = f"{release.architecture} at alpha {release.alpha:g}, by radapter-export"
        commit = api.create_commit(name, changes, commit_message=message)
    except Exception as error:  # the hub and the network raise many kinds of errors
        raise RAdapterError(
            f"could not push to {name}: {refused(error)} (nothing of it was sent, and the export is"
            f" complete in {settings.model_repository} and {settings.merged})"
        ) from error
    return f"{HUB}{name}@{commit.oid}"


def download_release(name: str) -> Path | None:
    """Download a release from the hub, and build a model repository of its files in the cache; None
    if there is no release.
    """
    folder = _fetch(name)
    data = folder / RELEASE
    if not (data / FILE).is_file():
        return None
    built = folder.parents[1] / BUILT
    target = built / folder.name  # named after the commit
    if releases_of(target):  # built before; the caller verifies its files on opening
        return target
    sums = load_sums(data / SUMS)
    _check_complete(name, data, sums)
    with disk_errors(built, f"{name} is built there; set HF_HOME to another folder"):
        built.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built, prefix=".") as scratch:
            place = Path(scratch, "repository")
            try:
                _build(place, data, sums)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
                raise RAdapterError(
                    f"the {FILE} of {name} is broken: {reason(error)}; push it again with"
                    " radapter-export"
                ) from error
            try:
                place.rename(target)
            except OSError:
                if not releases_of(target):  # otherwise another process built it meanwhile
                    raise
    return target


def _fetch(name: str) -> Path:
    """Download the files of a release into the hub's cache, and return the folder of its commit."""
    check_installed("huggingface_hub", "server")
    from huggingface_hub import constants, snapshot_download

    repository, revision = split_revision(name)
    try:
        # The library warns of a repository with another kind of model, which is allowed here.
        with quiet(), from_hub_or_cache():
            return Path(snapshot_download(repository, revision=revision, allow_patterns=[_PATTERN]))
    except Exception as error:  # the hub and the network raise many kinds of errors
        if unreachable() and is_absence(error):
            raise RAdapterError(
                f"{name} is not on this machine, and the Hugging Face hub can't be reached"
                f" ({unreachable()}); {how_to_bring(repository, folder=RELEASE)}"
            ) from error
        raise RAdapterError(
            f"could not get {name} from {constants.ENDPOINT}: {refused(error)}"
        ) from error


def _check_complete(name: str, data: Path, sums: Mapping[str, str]) -> None:
    """Verify the files by their digests: all parts of a release, and nothing else."""
    files = {path.relative_to(data).as_posix(): path for path in data.rglob("*") if path.is_file()}
    del files[SUMS]
    problems = differences(files, sums)
    graphs = [f"{model}/{_GRAPH[0]}" for model in ENCODERS if model != PATCH_ENCODER]
    for file in {TOKENIZER, *graphs} - files.keys():
        problems[file] = "is missing"
    for file in {*sums, *files}:
        if not _ALLOWED.fullmatch(file):
            problems[file] = "is not a part of a release"
    if problems:
        repository, _ = split_revision(name)
        raise RAdapterError(
            f"{name} is not as it was pushed: {shown(problems)}; fetch it again with: hf download"
            f' {repository} --include "{_PATTERN}" --force-download, or push it again with'
            " radapter-export"
        )


def _build(place: Path, data: Path, sums: Mapping[str, str]) -> None:
    """Build a model repository of the files, with this installation's configs and code."""
    release = Release.load(data)
    version = release.version
    for number in (version, release.max_batch_size):
        if not (isinstance(number, int) and 0 < number <= _MAX):
            raise ValueError(f"{number!r:.40} is not a version or a batch size")
    models = [model for model in MODELS if model != PATCH_ENCODER or release.dense]
    with Repository(place, models) as unfinished:
        for model in models:
            _link(data, sums, model, unfinished.staged(model, version))
        unfinished.add_code(version)
        unfinished.add_configs([release])
        unfinished.add_sums(version)
        unfinished.commit([version])


def _link(data: Path, sums: Mapping[str, str], model: str, folder: Path) -> None:
    """Link a model's files into its folder; runtimes may refuse the cache's symbolic links."""
    folder.mkdir()
    for file in sums:
        parent, _, name = file.rpartition("/")
        if parent == model:
            target = folder / name
        elif model not in ENCODERS and (
            file == FILE
            or (file == TOKENIZER and model in TOKENIZED)
            or (parent == LABEL_SETS and model in LABELLED)
        ):
            target = folder / file
        else:
            continue
        target.parent.mkdir(exist_ok=True)
        try:
            os.link((data / file).resolve(), target)
        except OSError:  # a disk without hard links
            shutil.copyfile(data / file, target)
