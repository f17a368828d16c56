"""Triton's configs (config.pbtxt) of the models in a repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import Release, release_parameters
from radapter_serve.release.repository import (
    CONFIG,
    ENCODERS,
    MODELS,
    PATCH_ENCODER,
    RUNTIMES,
    format_list,
    versions_of,
)

_BF16 = "HINT_BF16"  # parameter of openvino: "YES" or missing


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder of a model repository: its folder, its config.pbtxt, and its newest release."""

    folder: Path
    config: Any
    facts: Release

    @property
    def name(self) -> str:
        """Name of the model, such as `image_encoder`."""
        return self.folder.name

    @property
    def runtime(self) -> str:
        """The runtime that the config asks for."""
        runtime = str(self.config.backend)
        if runtime not in RUNTIMES:
            raise RAdapterError(
                f"{self.folder / CONFIG} asks for the backend {runtime!r}; allowed for an encoder"
                f" are {', '.join(RUNTIMES)}"
            )
        return runtime

    @property
    def versions(self) -> list[int]:
        """The served versions in the folder, the newest last; raises an error if there is none."""
        versions = versions_of(self.folder)
        wanted = self.config.version_policy.specific.versions or versions
        if served := [version for version in versions if version in wanted]:
            return served
        raise _lacking(self.folder, wanted)

    @property
    def instances(self) -> int:
        """Number of batches that each version computes at once."""
        return sum(group.count or 1 for group in self.config.instance_group) or 1

    def computed_in(self, precision: str | None) -> ServedEncoder:
        """This encoder, computed in `precision`; see `Release.computed_in`."""
        return replace(self, facts=self.facts.computed_in(precision))

    def configured(self, runtime: str, threads: int | None) -> str:
        """Text of the config.pbtxt for a runtime and a number of threads."""
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(self.config)
        if runtime != self.runtime:  # otherwise keep the owner's changes, such as KIND_CPU
            configure(config, runtime, self.facts.precision, self.facts.max_batch_size)
        elif runtime == "openvino" and self.facts.precision == "bf16":
            config.parameters[_BF16].string_value = "YES"
        if all(dim == -1 for tensor in config.input for dim in tensor.dims):
            # If all dimensions of the inputs are free, Triton cannot recognise an empty batch: it
            # accepts the request and never answers. Without Triton's batching the encoder gets the
            # empty batch; the tasks make batches of texts anyway.
            _batch(config, 0)
        if (name := RUNTIMES[runtime].threads) and threads:
            config.parameters[name].string_value = str(threads)
        return str(text_format.MessageToString(config))


def parsed(text: str) -> Any:
    """Parse the text of a config.pbtxt as a `ModelConfig`; unknown fields are ignored."""
    return text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=True)


def read_config(path: Path) -> Any:
    """Read a config.pbtxt as a `ModelConfig`."""
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RAdapterError(f"{path} is not a Triton model config: {error}") from error


def named_releases(config: Any) -> dict[int, Release]:
    """Read the releases in a config's parameters, by number."""
    texts = [
        value.string_value for key, value in config.parameters.items() if key.startswith("release.")
    ]
    try:
        releases = [Release.from_dict(json.loads(text)) for text in texts]
    except (ValueError, TypeError, RecursionError) as error:
        raise RAdapterError(
            f"the facts of a release in the config of {config.name} are not JSON: {error}"
        ) from error
    return {release.version: release for release in releases}


def name_releases(config: Any, releases: Mapping[int, Release]) -> None:
    """Replace the releases in a config's parameters, which clients read."""
    for name in [name for name in config.parameters if name.split(".")[0] == "release"]:
        del config.parameters[name]
    for name, text in release_parameters(releases.values()).items():
        config.parameters[name].string_value = text


def config_of(repository: Path, model: str, version: int) -> Any:
    """Read the config of a model for a release: Triton's if it names the release, else its own."""
    upper = repository / model / CONFIG
    lower = repository / model / str(version) / CONFIG
    if not lower.exists() or (upper.exists() and version in named_releases(read_config(upper))):
        return read_config(upper)
    return read_config(lower)


def encoders_of(repository: Path, releases: Sequence[int] = ()) -> list[ServedEncoder]:
    """List the exported encoders of a model repository, of these releases or those in use."""
    encoders = []
    if not releases:
        for path in sorted(repository.glob(f"*/{CONFIG}")):
            config = read_config(path)
            if config.backend in RUNTIMES and "release" in config.parameters:
                facts = json.loads(config.parameters["release"].string_value)
                encoders.append(ServedEncoder(path.parent, config, Release.from_dict(facts)))
        return encoders
    for model in ENCODERS:
        folder = repository / model
        versions = [version for version in versions_of(folder) if version in releases]
        if versions:
            config = config_of(repository, model, versions[-1])
            config.version_policy.specific.versions[:] = versions
            release = Release.load(repository / MODELS[-1] / str(versions[-1]))
            encoders.append(ServedEncoder(folder, config, release))
        elif model != PATCH_ENCODER and (folder / CONFIG).exists():
            raise _lacking(folder, releases)
    return encoders


def _lacking(folder: Path, releases: Iterable[int]) -> RAdapterError:
    names = ", ".join(map(str, releases)) or "none at all"
    return RAdapterError(
        f"{folder} lacks the releases that are to be served ({names}); run: radapter-export"
    )


def configure(config: Any, runtime: str, precision: str, max_batch_size: int) -> None:
    """Set an encoder's config to a runtime, in place, whatever the config asked for before."""
    ours = {
        _BF16,
        *(name for known in RUNTIMES.values() for name in (*known.parameters, known.threads)),
    }
    for name in ours & set(config.parameters):
        del config.parameters[name]
    chosen = RUNTIMES[runtime]
    config.backend = runtime
    config.default_model_filename = chosen.file
    for group in config.instance_group:
        group.kind = model_config_pb2.ModelInstanceGroup.Kind.Value(chosen.kind)
        group.gpus[:] = chosen.gpus
    config.optimization.execution_accelerators.ClearField("gpu_execution_accelerator")
    if chosen.cuda:
        config.optimization.execution_accelerators.gpu_execution_accelerator.add(
            name="cuda", parameters=chosen.cuda
        )
    parameters = dict(chosen.parameters)
    if runtime == "openvino" and precision == "bf16":
        parameters[_BF16] = "YES"
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    _batch(config, max_batch_size if chosen.batched else 0)


def _batch(config: Any, max_batch_size: int) -> None:
    was = config.max_batch_size
    config.max_batch_size = max_batch_size
    if bool(was) == bool(max_batch_size):
        return
    for tensor in (*config.input, *config.output):
        tensor.dims[:] = tensor.dims[1:] if max_batch_size else [-1, *tensor.dims]
    config.ClearField("dynamic_batching")
    if max_batch_size:
        config.dynamic_batching.SetInParent()


def check(
    repository: Path, versions: Iterable[int], progress: Callable[[str], None] = lambda line: None
) -> None:
    """Check releases before they are served, with `verify` and `check_configs`."""
    for version in versions:
        verify(repository, version, progress)
        check_configs(repository, version)


def check_configs(repository: Path, version: int) -> None:
    """Check that the models' configs match each other and a release; their owner may change
    instances, kinds and engines, but not names and tensors.
    """
    release = Release.load(repository / MODELS[-1] / str(version))
    exported: dict[str, Any] = {}
    naming = []  # models whose config names this release
    others = []
    models = [model for model in MODELS if (repository / model / str(version)).is_dir()]
    for model in models:
        if (path := repository / model / str(version) / CONFIG).exists():
            exported[model] = read_config(path)
        if not (path := repository / model / CONFIG).exists():
            others.append(f"{model} (missing)")
            continue
        config = read_config(path)
        names = named_releases(config)
        if version not in names:
            others.append(f"{model} (of release {format_list(sorted(names))})")
            continue
        naming.append(model)
        wrong = ""
        if names[version] != release:
            wrong = f"it is of another release {version} than {repository}/{MODELS[-1]}/{version}"
        elif model in exported:
            wrong = _difference(exported[model], config)
        if wrong:
            raise RAdapterError(
                f"{path}: {wrong}; to mend it, copy {model}/{version}/{CONFIG} over it, or export"
                " again with radapter-export"
            )
    if not naming and len(exported) < len(models):
        raise RAdapterError(
            f"release {version} in {repository} cannot be served any more: it has no config of"
            f" {', '.join(model for model in models if model not in exported)}; export it again"
            " with radapter-export"
        )
    if naming and others:
        raise RAdapterError(
            f"the configs in {repository} are of several releases: config.pbtxt names release"
            f" {version} in {', '.join(sorted(naming))}, but not in {', '.join(others)}; copy"
            " all of them again, or export again with radapter-export"
        )


def _difference(exported: Any, config: Any) -> str:
    """Describe a change that the owner may not make, in the model's name or tensors; "" if none."""
    if config.name != exported.name:
        return f"it is the config of {config.name or 'no model'}"
    for kind in ("input", "output"):
        ours, theirs = (
            {
                # Triton's batch dimension counts like a first dimension of the tensor.
                tensor.name: (tensor.data_type, [-1] * bool(of.max_batch_size) + [*tensor.dims])
                for tensor in getattr(of, kind)
            }
            for of in (exported, config)
        )
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return f"the {kind} {name} is not the one that was exported"
    return ""
