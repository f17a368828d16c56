"""Adds releases to a model repository, which Triton serves, atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.errors import RAdapterError
from radapter_serve.files import lock, remove
from radapter_serve.release.config import configure, name_releases, read_config
from radapter_serve.release.integrity import write_sums
from radapter_serve.release.release import Release
from radapter_serve.release.repository import CONFIG, ENCODERS, MODELS, PATCH_ENCODER, versions_of
from radapter_serve.tasks.table import TASKS

TEMPLATE = "config.template.pbtxt"
TOKENIZED = ("embed_text", "segment", "classify")  # models with the tokenizer
LABELLED = ("segment", "classify")  # models with the label sets
STAGED = ".export-"  # Triton ignores a model's subfolders whose names are not numbers


def sources() -> Path:
    """Folder of the models' templates and code: next to this file in a wheel, or in a checkout."""
    here = Path(__file__).resolve().parent
    packed = here / "model_repository"
    return packed if packed.is_dir() else here.parents[1] / "model_repository"


class Repository:
    """A model repository to which releases are added, in temporary folders until `commit`. Entering
    removes the leftovers of a killed export.
    """

    def __init__(self, folder: str | Path, models: Sequence[str] = MODELS) -> None:
        self.folder = Path(folder).absolute()
        self.models = tuple(models)
        # In a checkout, releases are next to the templates, so `rm -r` may remove both.
        code = sources() / "classify" / "model.py"
        if not code.is_file():
            raise RAdapterError(
                f"{code} is missing, a part of radapter-serve; bring it back with: git checkout --"
                f" {code.parents[1]}, or install radapter-serve again"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise RAdapterError(f"{self.folder} is a file; give a folder with --model-repository")
        self._new: list[Path] = []
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Repository:
        try:
            self._make(self.folder)
            self._held.enter_context(lock(self.folder, "radapter-export or radapter-build-engine"))
            self._remove_leftovers()
            for model in self.models:
                self._make(self.folder / model)
                self.staged(model).mkdir()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for model in self.models:
            remove(self.staged(model))
        for folder in reversed(self._new):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        self._held.close()

    def staged(self, model: str, version: int | None = None) -> Path:
        """Temporary folder of a model, or of one version of it."""
        folder = self.folder / model / f"{STAGED}{os.getpid()}"
        return folder if version is None else folder / str(version)

    def next_version(self) -> int:
        """Number after the highest version of any model."""
        versions = [version for model in MODELS for version in versions_of(self.folder / model)]
        return max(versions, default=0) + 1

    def add_code(self, version: int) -> None:
        """Copy the `model.py` of each task into a version."""
        for model in self.models:
            if model not in ENCODERS:
                target = self.staged(model, version) / "model.py"
                shutil.copyfile(sources() / model / "model.py", target)

    def add_configs(self, releases: Sequence[Release]) -> None:
        """Write each model's config for all of these releases, oldest first, and for each one
        alone, with which a server can return to it after a later export.
        """
        for model in self.models:
            template = sources() / model / TEMPLATE
            text = config(template, model, releases)
            (self.staged(model) / CONFIG).write_text(text, encoding="utf-8")
            for release in releases:
                alone = text if len(releases) == 1 else config(template, model, [release])
                path = self.staged(model, release.version) / CONFIG
                path.write_text(alone, encoding="utf-8")

    def add_sums(self, version: int) -> None:
        """Write the digests of all files of a complete version."""
        # Build a repository of this one version out of links to the staged folders.
        with tempfile.TemporaryDirectory() as name:
            for model in self.models:
                link = Path(name, model, str(version))
                link.parent.mkdir()
                link.symlink_to(self.staged(model, version), target_is_directory=True)
            write_sums(Path(name), version)

    def commit(self, versions: Sequence[int]) -> None:
        """Move the versions into place, `classify` last, then the configs that make Triton serve
        them.
        """
        for model in self.models:
            for version in versions:
                self.staged(model, version).rename(self.folder / model / str(version))
        for model in self.models:
            (self.staged(model) / CONFIG).replace(self.folder / model / CONFIG)
        for model in set(MODELS) - set(self.models):
            (self.folder / model / CONFIG).unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Create a folder and its parents, and remember the new ones."""
        self._new += [path for path in (folder, *folder.parents) if not path.exists()][::-1]
        folder.mkdir(parents=True, exist_ok=True)

    def _remove_leftovers(self) -> None:
        complete = set(versions_of(self.folder / MODELS[-1]))
        # Refuse a model of another maker, whose versions would look like leftovers.
        for model in MODELS:
            folder = self.folder / model
            path = folder / CONFIG
            if any(folder.glob(f"{STAGED}*")):
                continue
            if path.is_file() and 'key: "release"' in path.read_text("utf-8"):
                continue
            # After a release without patches, patch_encoder has versions but no config.
            ours = complete if model == PATCH_ENCODER else set()
            if set(versions_of(folder)) - ours or path.is_file():
                raise RAdapterError(
                    f"{folder} holds a model that radapter-export did not make; move it, or give"
                    " another --model-repository"
                )
        for model in MODELS:
            folder = self.folder / model
            for version in versions_of(folder):
                if version not in complete:
                    remove(folder / str(version))
            for path in folder.glob(f"{STAGED}*"):
                remove(path)


def config(template: Path, model: str, releases: Sequence[Release]) -> str:
    """Fill in a model's config template for releases of one base, oldest first."""
    parsed = read_config(template)
    newest = releases[-1]
    parsed.name = model

    # Add the inputs and outputs of a task; an encoder's template has its own.
    if (table := TASKS.get(model)) is not None:
        for field, tensors in ((parsed.input, table.inputs), (parsed.output, table.outputs)):
            for tensor in tensors.values():
                kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
                data_type = model_config_pb2.DataType.Value(f"TYPE_{kind}")
                described = field.add(name=tensor.name, data_type=data_type, dims=tensor.dims)
                if tensor.optional:
                    described.optional = True
                    # Allow batches of requests whose lists have different lengths.
                    described.allow_ragged_batch = table.batched and tensor.dims == (-1,)

    # Set the largest batch, if the template has batches.
    if parsed.max_batch_size:
        parsed.max_batch_size = newest.max_batch_size
    if parsed.HasField("dynamic_batching"):
        sizes = parsed.dynamic_batching.preferred_batch_size
        parsed.dynamic_batching.preferred_batch_size[:] = [
            size for size in sizes if size <= newest.max_batch_size
        ]

    # Set the shapes of the encoders' tensors, without the batch.
    side = newest.preprocess.size
    width = newest.embed_dim
    grid = newest.dense.grid if newest.dense else 0
    length = -1 if newest.tokenizer.dynamic_length else newest.tokenizer.context_length
    dims = {
        "image": [side, side, 3],
        "tokens": [length],
        "image_embeds": [width],
        "patch_embeds": [grid, grid, width],
        "text_embeds": [width],
    }
    for tensor in (*parsed.input, *parsed.output):
        if tensor.name in dims and len(tensor.dims) == len(dims[tensor.name]):
            tensor.dims[:] = dims[tensor.name]
    if model in ENCODERS and newest.dynamic_alpha:
        parsed.input.add(name="alpha", data_type=model_config_pb2.TYPE_FP32, dims=[1])

    # Name versions by number, not "the latest K", so that leftovers of a killed export are never
    # served.
    parsed.version_policy.specific.versions[:] = [release.version for release in releases]
    name_releases(parsed, {release.version: release for release in releases})
    if model in ENCODERS:
        configure(parsed, newest.runtime, newest.precision, newest.max_batch_size)
    return str(text_format.MessageToString(parsed))
