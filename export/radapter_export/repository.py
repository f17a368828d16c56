"""The model repository that Triton serves: releases are added to it whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_export.files import STAGED, disk_errors, make_folder, remove_empty
from radapter_serve.errors import RAdapterError
from radapter_serve.lock import lock
from radapter_serve.release.config import configure, name_releases
from radapter_serve.release.integrity import write_sums
from radapter_serve.release.release import Release
from radapter_serve.release.repository import CONFIG, ENCODERS, MODELS, PATCH_ENCODER, versions_of
from radapter_serve.tasks.table import TASKS

TEMPLATE = "config.template.pbtxt"


def sources() -> Path:
    """The models' templates and `model.py` files: in the wheel beside this file, else in the
    checkout.
    """
    here = Path(__file__).resolve().parent
    packed = here / "model_repository"
    return packed if packed.is_dir() else here.parents[1] / "model_repository"


def check_sources(models: Sequence[str]) -> None:
    """Refuse an installation that lacks a part of itself: in a checkout the files of releases lie
    beside these, and who removes them all may remove these too.

    Args:
        models: those that a release will have.

    Raises:
        RAdapterError: names the first file that is missing, and how it comes back.
    """
    for model in models:
        for name in (TEMPLATE,) if model in ENCODERS else (TEMPLATE, "model.py"):
            path = sources() / model / name
            if not path.is_file():
                raise RAdapterError(
                    f"{path} is missing, a part of radapter-serve; bring it back with: git checkout"
                    f" -- {path.parents[1]}, or install radapter-serve again"
                )


class Repository:
    """A model repository while releases are added: they stand in temporary folders until `commit`.

    A context manager: on entry it removes what a killed export left, on exit whatever was not
    committed.

    Args:
        folder: the repository; made if there is none.
        models: those that the releases have, in the order of `MODELS`; the others are not served
            any more.

    Raises:
        RAdapterError: the folder cannot be written, or another export is writing it, or this
            installation is not whole.
    """

    def __init__(self, folder: str | Path, models: Sequence[str] = MODELS) -> None:
        check_sources(models)
        self.folder = Path(folder).absolute()
        self.models = tuple(models)
        if self.folder.exists() and not self.folder.is_dir():
            raise RAdapterError(f"{self.folder} is a file; give a folder with --model-repository")
        self._new: list[Path] = []
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Repository:
        try:
            with disk_errors(self.folder):
                self._new = make_folder(self.folder)
                self._held.enter_context(
                    lock(self.folder, "radapter-export or radapter-build-engine")
                )
                self._remove_leftovers()
                for model in self.models:
                    self._new += make_folder(self.folder / model)
                    self.staged(model).mkdir()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for model in self.models:
            shutil.rmtree(self.staged(model), ignore_errors=True)
        remove_empty(self._new)
        self._held.close()

    def staged(self, model: str, version: int | None = None) -> Path:
        """The temporary folder of a model, or of one version of it."""
        folder = self.folder / model / f"{STAGED}{os.getpid()}"
        return folder if version is None else folder / str(version)

    @contextlib.contextmanager
    def view(self, version: int) -> Iterator[Path]:
        """A staged version as a repository of its own, to be read while it is not yet in place."""
        with tempfile.TemporaryDirectory() as name:
            for model in self.models:
                Path(name, model).mkdir()
                Path(name, model, str(version)).symlink_to(
                    self.staged(model, version), target_is_directory=True
                )
            yield Path(name)

    def next_version(self) -> int:
        """One more than the highest version of any model."""
        return (
            max(
                (version for model in MODELS for version in versions_of(self.folder / model)),
                default=0,
            )
            + 1
        )

    def add_config(self, model: str, releases: Sequence[Release]) -> None:
        """Write a model's configs from its template: for the versions of these releases, and for
        each of them alone.

        Args:
            model: its name.
            releases: oldest first, all of one base; the newest says how many rows a batch has,
                where the template says more than 0.
        """
        template = sources() / model / TEMPLATE
        of_all = config(template, model, releases)
        with disk_errors(self.folder):
            (self.staged(model) / CONFIG).write_text(of_all, encoding="utf-8")
            # Its own outlives the next export, for a server that goes back to it.
            for release in releases:
                own = of_all if len(releases) == 1 else config(template, model, [release])
                path = self.staged(model, release.version) / CONFIG
                path.write_text(own, encoding="utf-8")

    def add_sums(self, version: int) -> None:
        """Write the digests of all files of a version, which is complete."""
        with disk_errors(self.folder), self.view(version) as view:
            write_sums(view, version)

    def add_model_file(self, model: str, version: int) -> None:
        """Copy a task's model.py into a version."""
        with disk_errors(self.folder):
            shutil.copyfile(
                sources() / model / "model.py", self.staged(model, version) / "model.py"
            )

    def commit(self, versions: Sequence[int]) -> None:
        """Put the versions in place, then the configs that make Triton serve them; encoders first,
        `classify` last.

        At the very end, when no release needs them, the configs go of the models that these
        releases lack.
        """
        with disk_errors(self.folder):
            for model in self.models:
                for version in versions:
                    self.staged(model, version).rename(self.folder / model / str(version))
            for model in self.models:
                (self.staged(model) / CONFIG).replace(self.folder / model / CONFIG)
            for model in set(MODELS) - set(self.models):
                (self.folder / model / CONFIG).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        complete = set(versions_of(self.folder / MODELS[-1]))
        for model in MODELS:
            self._check_ours(model, complete if model == PATCH_ENCODER else set())
        for model in MODELS:
            for version in versions_of(self.folder / model):
                if version not in complete:
                    shutil.rmtree(self.folder / model / str(version), ignore_errors=True)
            for folder in (self.folder / model).glob(f"{STAGED}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _check_ours(self, model: str, retired: set[int]) -> None:
        """Refuse a model of another maker: what looks like a leftover would be removed, and its
        config replaced.

        Args:
            model: its name.
            retired: versions that are ours even where no config says so.
        """
        folder = self.folder / model
        config = folder / CONFIG
        if any(folder.glob(f"{STAGED}*")) or (
            config.is_file() and 'key: "release"' in config.read_text("utf-8")
        ):
            return
        if set(versions_of(folder)) - retired or config.is_file():
            raise RAdapterError(
                f"{folder} holds a model that radapter-export did not make; move it, or give"
                " another --model-repository"
            )


def dims_of(release: Release) -> dict[str, list[int]]:
    """Shapes of the encoders' tensors, without the batch."""
    size = int(release.preprocess["size"])
    width = release.embed_dim
    grid = int(release.dense["grid"]) if release.dense else 0
    open_length = release.tokenizer["dynamic_length"]
    return {
        "image": [size, size, 3],
        "tokens": [-1 if open_length else int(release.tokenizer["context_length"])],
        "image_embeds": [width],
        "patch_embeds": [grid, grid, width],
        "text_embeds": [width],
    }


@functools.lru_cache(maxsize=len(MODELS))
def _parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def add_tensors(parsed: model_config_pb2.ModelConfig, model: str) -> None:
    """Give a task's config the inputs and outputs of the table; an encoder's has its own."""
    table = TASKS.get(model)
    if table is None:
        return
    for field, tensors in ((parsed.input, table.inputs), (parsed.output, table.outputs)):
        for tensor in tensors.values():
            kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
            described = field.add(
                name=tensor.name,
                data_type=model_config_pb2.DataType.Value(f"TYPE_{kind}"),
                dims=tensor.dims,
            )
            if tensor.optional:
                described.optional = True
                # Requests whose lists have other lengths share a batch.
                described.allow_ragged_batch = table.batched and tensor.dims == (-1,)


def config(
    template: Path,
    model: str,
    releases: Sequence[Release],
) -> str:
    """Fill in a config template; the arguments are those of `Repository.add_config`.

    Raises:
        RAdapterError: there is no template, or it is not a model config.
    """
    parsed = model_config_pb2.ModelConfig()
    try:
        parsed.CopyFrom(_parsed(template.read_text(encoding="utf-8")))
    except OSError as error:
        raise RAdapterError(
            f"no template {template}: {error.strerror}; install radapter-serve again"
        ) from error
    except text_format.ParseError as error:
        raise RAdapterError(f"{template} is not a Triton model config: {error}") from error
    add_tensors(parsed, model)
    dims = dims_of(releases[-1])
    max_batch_size = releases[-1].max_batch_size
    parsed.name = model
    if parsed.max_batch_size:
        parsed.max_batch_size = max_batch_size
    if parsed.HasField("dynamic_batching"):
        preferred = [
            size for size in parsed.dynamic_batching.preferred_batch_size if size <= max_batch_size
        ]
        parsed.dynamic_batching.preferred_batch_size[:] = preferred
    for tensor in (*parsed.input, *parsed.output):
        if tensor.name in dims and len(tensor.dims) == len(dims[tensor.name]):
            tensor.dims[:] = dims[tensor.name]
    if model in ENCODERS and releases[-1].dynamic_alpha:
        parsed.input.add(name="alpha", data_type=model_config_pb2.TYPE_FP32, dims=[1])
    # By number, not "the latest K": what a killed export left, or half of a release, is never
    # served.
    parsed.version_policy.specific.versions[:] = [release.version for release in releases]
    name_releases(parsed, {release.version: release for release in releases})
    if model in ENCODERS:
        configure(parsed, releases[-1].runtime, releases[-1].precision, max_batch_size)
    return str(text_format.MessageToString(parsed))
