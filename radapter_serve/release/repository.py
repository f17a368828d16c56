"""What a model repository holds: releases, encoders, and the configs by which Triton is asked for a
runtime.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import LEAST_COSINE, Tolerance
from radapter_serve.release.release import FILE, TASKS, Release, release_parameters

PATCH_ENCODER = "patch_encoder"  # the one model that a release may lack
ENCODERS = ("image_encoder", PATCH_ENCODER, "text_encoder")
MODELS = (*ENCODERS, *TASKS)  # in the order of writing
CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class Runtime:
    """How a config.pbtxt asks for a runtime, besides `backend`, which is its name.

    Attributes:
        file: what it loads, in a version's folder.
        kind: where its instances run.
        threads: the parameter that says how many threads an instance computes with, if there is
            one.
        parameters: those that every config has.
        gpus: on which its instances run; all that there are if empty.
        cuda: options of ONNX Runtime's provider on a GPU.
        batched: whether Triton puts requests together. NVIDIA's `openvino` backend pads every batch
            to `max_batch_size` rows if it does, so there a tensor's first dimension is its own, and
            any number of rows.
    """

    file: str
    kind: int = model_config_pb2.ModelInstanceGroup.KIND_AUTO
    threads: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[int, ...] = ()
    cuda: Mapping[str, str] = field(default_factory=dict)
    batched: bool = True


TENSORRT = "tensorrt"
CUDA_OPTIONS = {
    "use_tf32": "0"
}  # TF32 is ONNX Runtime's default, and differs from fp32 in the fourth digit
RUNTIMES = {
    "onnxruntime": Runtime(
        "model.onnx",
        threads="intra_op_thread_count",
        # The cores are shared with decoding and the network: waiting threads must not spin on them.
        # The backend of radapter-serve heeds this; NVIDIA's own in C++ may ignore it.
        parameters={"session.intra_op.allow_spinning": "0"},
        cuda=CUDA_OPTIONS,
    ),
    "openvino": Runtime(
        "model.onnx",
        kind=model_config_pb2.ModelInstanceGroup.KIND_CPU,
        threads="INFERENCE_NUM_THREADS",
        parameters={"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"},
        batched=False,
    ),
    # On the GPU that engines are built for and checked against.
    TENSORRT: Runtime("model.plan", kind=model_config_pb2.ModelInstanceGroup.KIND_GPU, gpus=(0,)),
}
AUTO = "auto"  # the fastest of them
_BF16 = "HINT_BF16"  # of openvino, "YES" or not there


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder of a model repository.

    Attributes:
        folder: the model's.
        config: its config.pbtxt.
        facts: its newest release.
    """

    folder: Path
    config: Any
    facts: Release

    @property
    def name(self) -> str:
        """For example `image_encoder`."""
        return self.folder.name

    @property
    def runtime(self) -> str:
        """By which it was exported."""
        return str(self.config.backend)

    @property
    def bounds(self) -> Tolerance:
        """How far from torch it may be, as at its export."""
        agreement = self.facts.agreement
        return Tolerance(
            float(agreement["tolerance"]), max(LEAST_COSINE, float(agreement["min_cosine"]))
        )

    @property
    def versions(self) -> list[int]:
        """The served ones that are there, the newest last.

        Raises:
            RAdapterError: there is none.
        """
        found = versions_of(self.folder)
        wanted = self.config.version_policy.specific.versions or found
        if served := [version for version in found if version in wanted]:
            return served
        names = ", ".join(map(str, wanted)) or "none at all"
        raise RAdapterError(
            f"{self.folder} lacks the releases that it serves ({names}); run: radapter-export"
        )

    @property
    def instances(self) -> int:
        """How many batches each version computes at once."""
        return sum(group.count or 1 for group in self.config.instance_group) or 1

    def file(self, version: int, runtime: str) -> Path:
        """What a runtime loads.

        Raises:
            RAdapterError: it is not there.
        """
        path = self.folder / str(version) / RUNTIMES[runtime].file
        if not path.exists():
            plan = RUNTIMES[runtime].file == "model.plan"
            make = (
                f"build it here with: radapter-build-engine {self.folder.parent}"
                if plan
                else "run: radapter-export"
            )
            raise RAdapterError(f"{path}, which {runtime} needs, does not exist; {make}")
        return path

    def configured(self, runtime: str, threads: int | None) -> str:
        """The text of a config.pbtxt for another runtime or number of threads."""
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(self.config)
        if runtime != self.runtime:  # else what its owner may have changed stays, such as KIND_CPU
            configure(config, runtime, self.facts.precision, self.facts.max_batch_size)
        if all(dim == -1 for tensor in config.input for dim in tensor.dims):
            # Where no size tells Triton that an empty batch is none, it takes the request and never
            # answers it. Without batches of Triton's the encoder gets to see it; the tasks make the
            # batches of texts anyway.
            _batch(config, 0)
        if (name := RUNTIMES[runtime].threads) and threads:
            config.parameters[name].string_value = str(threads)
        return str(text_format.MessageToString(config))


def versions_of(model: Path) -> list[int]:
    """The versions of a model that are in its folder, the newest last; none where there is no
    such folder.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(
            int(path.name) for path in model.iterdir() if path.name.isdecimal() and path.is_dir()
        )
    return []


def releases_of(repository: Path) -> list[int]:
    """The complete releases of a model repository, the newest last."""
    task = repository / MODELS[-1]
    return [version for version in versions_of(task) if (task / str(version) / FILE).exists()]


def newest_export(repository: Path) -> list[int]:
    """The releases that the configs ask Triton to serve, which are those of the newest export; the
    newest last.

    Raises:
        RAdapterError: the config of `classify` is broken.
    """
    found = releases_of(repository)
    if not found or not (path := repository / MODELS[-1] / CONFIG).exists():
        return found[-1:]
    policy = read_config(path).version_policy
    if wanted := list(policy.specific.versions):
        return [version for version in found if version in wanted]
    return found if policy.HasField("all") else found[-max(1, policy.latest.num_versions) :]


def split_repository(repository: str | Path) -> tuple[str, str]:
    """The folder of `DIR@N`, and the number of the release, which is empty where none is named.

    A folder whose own name ends so is itself meant.
    """
    path, at, number = str(repository).rpartition("@")
    named = at and number.isdecimal() and not Path(repository).is_dir()
    return (path, number) if named else (str(repository), "")


def find_release(repository: str | Path) -> Path:
    """The folder of a release in a model repository, that of its task `classify`.

    Args:
        repository: the model repository; `DIR@N` names release N, the newest otherwise.

    Raises:
        RAdapterError: no release there, or none of that number.
    """
    path, number = split_repository(repository)
    task = Path(path, MODELS[-1])
    found = releases_of(Path(path))
    if not found:
        raise RAdapterError(
            f"no release in the model repository {path}; make one with radapter-export"
        )
    if number and int(number) not in found:
        raise RAdapterError(f"no release {number} in {path}; it holds {', '.join(map(str, found))}")
    return task / str(int(number) if number else found[-1])


def releases_with_digest(repository: Path, digest: str, alpha: float) -> list[int]:
    """The releases of a model repository that embed as one with this digest does, the newest last.

    Args:
        repository: the model repository.
        digest: of the release.
        alpha: of the release; those that take any are asked at this one.
    """
    found = []
    for version in releases_of(repository):
        with contextlib.suppress(RAdapterError):
            release = Release.load(repository / MODELS[-1] / str(version))
            if release.dynamic_alpha:
                release = release.at(alpha)
            if release.digest == digest:
                found.append(version)
    return found


def read_config(path: Path) -> Any:
    """A `ModelConfig` as it is in a config.pbtxt.

    Raises:
        RAdapterError: it is missing or broken.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # A server may be newer than what is known here.
        return text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RAdapterError(f"{path} is not a Triton model config: {error}") from error


def named_releases(config: Any) -> dict[int, Release]:
    """The releases that a config names in its parameters, by number.

    Raises:
        RAdapterError: what it says of one is broken.
    """
    texts = {key: value.string_value for key, value in config.parameters.items()}
    keys = [key for key in texts if key.startswith("release.")] or [
        key for key in texts if key == "release"
    ]
    try:
        found = [Release.from_dict(json.loads(texts[key])) for key in keys]
    except (ValueError, TypeError, RecursionError) as error:
        raise RAdapterError(
            f"the config of {config.name} says of its release what is no JSON: {error}"
        ) from error
    return {int(release.version): release for release in found}


def name_releases(config: Any, releases: Mapping[int, Release]) -> None:
    """Name releases in a config's parameters, in place of those that it names, for clients to read.

    Args:
        config: a `ModelConfig`, changed in place.
        releases: the facts of each by number; the highest is also the one without a number.
    """
    for name in [name for name in config.parameters if name.split(".")[0] == "release"]:
        del config.parameters[name]
    for name, text in release_parameters(releases.values()).items():
        config.parameters[name].string_value = text


def config_of(repository: Path, model: str, version: int) -> Any:
    """The config of a model for a release: the one that Triton reads, where it names the release,
    else its own.

    Raises:
        RAdapterError: there is none, or it is broken.
    """
    upper = repository / model / CONFIG
    own = repository / model / str(version) / CONFIG
    if not own.exists() or (upper.exists() and version in named_releases(read_config(upper))):
        return read_config(upper)
    return read_config(own)


def encoders_of(repository: Path, releases: Sequence[int] = ()) -> list[ServedEncoder]:
    """The encoders that radapter-export wrote into a model repository.

    Args:
        repository: the model repository.
        releases: those to be served; as the configs say if there are none.

    Raises:
        RAdapterError: a config.pbtxt is broken, or an encoder lacks all these releases.
    """
    found = []
    for model in ENCODERS if releases else ():
        folder = repository / model
        versions = [version for version in versions_of(folder) if version in releases]
        if (
            not versions and (folder / CONFIG).exists() and model != "patch_encoder"
        ):  # which a release may go without
            names = ", ".join(map(str, releases))
            raise RAdapterError(
                f"{folder} lacks the releases that are to be served ({names}); run: radapter-export"
            )
        if versions:
            config = config_of(repository, model, versions[-1])
            config.version_policy.specific.versions[:] = versions
            found.append(
                ServedEncoder(
                    folder, config, Release.load(repository / MODELS[-1] / str(versions[-1]))
                )
            )
    if releases:
        return found
    for path in sorted(repository.glob(f"*/{CONFIG}")):
        config = read_config(path)
        if config.backend in RUNTIMES and "release" in config.parameters:
            facts = json.loads(config.parameters["release"].string_value)
            found.append(ServedEncoder(path.parent, config, Release.from_dict(facts)))
    return found


def configure(config: Any, runtime: str, precision: str, max_batch_size: int) -> None:
    """Make an encoder's config ask for a runtime, whatever it asked for before.

    Args:
        config: a `ModelConfig`, changed in place.
        runtime: one of `RUNTIMES`.
        precision: of the release.
        max_batch_size: rows of a batch.
    """
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
        group.kind = chosen.kind
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


def without_queue_policy(config: Any) -> None:
    """Take the limits of Triton's own queue out of a config, in place.

    A queue that has any is not looked at when a model becomes free: what waits there waits for the
    next request, or for half a second. `radapter_serve.server.backlog` has the limits instead.
    """
    if config.HasField("dynamic_batching"):
        config.dynamic_batching.ClearField("default_queue_policy")
        config.dynamic_batching.ClearField("priority_queue_policy")
        config.dynamic_batching.ClearField("priority_levels")
    if not config.max_batch_size:
        config.ClearField("dynamic_batching")
