"""Which runtime runs the encoders on this machine: any that computes what torch computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.plans import check_plan
from radapter_serve.encoders.tensorrt import find_gpu
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.config import ServedEncoder, encoders_of
from radapter_serve.release.repository import AUTO, TENSORRT
from radapter_serve.server.installation import Installation


@dataclass
class Configured:
    """The encoders of a repository as this machine is to serve them."""

    runtime: str | None  # of all of them; None if each has that of its export
    configs: dict[str, str] = field(default_factory=dict)  # runtime and threads of each, by name
    version_compatible: bool = False  # whether an engine brings its runtime, code to be allowed
    checked: set[str] = field(default_factory=set)  # encoders that were compared with torch


def configure(
    repository: Path,
    releases: Sequence[int],
    runtime: str | None,
    threads: int,
    installation: Installation,
    progress: Callable[[str], None],
) -> Configured:
    """Choose the runtime of each encoder, and check that it computes what torch computed.

    Without `releases` the configs say which are served; without `runtime`, by what. The instances
    of an encoder share the `threads`.
    """
    encoders = encoders_of(repository, releases)
    if runtime is not None and not encoders:
        raise RAdapterError(
            f"{repository} holds no encoder of radapter-export; leave --runtime {runtime} out"
        )
    if runtime == AUTO:
        return _fastest(encoders, threads, installation, progress)
    configured = Configured(runtime)
    for encoder in encoders:
        chosen = runtime or encoder.runtime
        if chosen not in installation.backends:
            raise RAdapterError(
                f"{installation.binary} has no backend {chosen}, which {encoder.name} asks for"
            )
        _add(configured, encoder, chosen, threads, progress, check=chosen != encoder.runtime)
    return configured


def usual_order(encoder: ServedEncoder, *, on_gpu: bool) -> list[str]:
    """Runtimes for an encoder, the one that is usually fastest first (docs/export.md).

    On a CPU that is OpenVINO, but for int8 whose ranges are found at run time.
    """
    if on_gpu:
        return [TENSORRT, "onnxruntime", "openvino"]
    quantization = encoder.facts.quantization or {}
    if quantization.get("kind") == "dynamic":
        return ["onnxruntime", "openvino"]
    return ["openvino", "onnxruntime"]


def _fastest(
    encoders: Sequence[ServedEncoder],
    threads: int,
    installation: Installation,
    progress: Callable[[str], None],
) -> Configured:
    """The first runtime in the usual order that is there and agrees with torch in all encoders."""
    try:
        find_gpu()
        on_gpu = True
    except RAdapterError:
        on_gpu = False
    reasons = []
    for runtime in usual_order(encoders[0], on_gpu=on_gpu):
        configured = Configured(runtime)
        try:
            if runtime not in installation.backends:
                raise RAdapterError(f"this server has no backend {runtime}")
            for encoder in encoders:
                _add(configured, encoder, runtime, threads, progress, check=True)
            return configured
        except RAdapterError as error:
            reasons.append(str(error))
    raise RAdapterError(f"no runtime can run all encoders: {'; '.join(reasons)}")


def _add(
    configured: Configured,
    encoder: ServedEncoder,
    runtime: str,
    threads: int,
    progress: Callable[[str], None],
    *,
    check: bool,
) -> None:
    # An encoder's instances compute at once when many ask for it. Encoders are not set against each
    # other: where only images are asked for, half of the cores would idle, and where texts are,
    # too, so many threads cost no more than they do one encoder alone (benchmarks/README.md).
    per_instance = max(1, threads // encoder.instances)
    files = [encoder.file(version, runtime) for version in encoder.versions]
    if runtime == TENSORRT:
        plans = [check_plan(file.parent) for file in files]
        configured.version_compatible |= any(plan.options.version_compatible for plan in plans)
    if check:
        progress(f"checking {encoder.name} by {runtime}")
        try:
            check_agreement(encoder, runtime, per_instance)
        except RAdapterError as error:
            raise RAdapterError(
                f"{error}; leave --runtime out ({encoder.name} was exported for"
                f" {encoder.runtime}), or export for it: radapter-export --runtime {runtime}"
            ) from error
        configured.checked.add(encoder.name)
    configured.configs[encoder.name] = encoder.configured(runtime, per_instance)


def check_agreement(encoder: ServedEncoder, runtime: str, threads: int | None = None) -> float:
    """Largest 1 − cosine between a runtime's embeddings and torch's, over all samples of all
    served versions; raises an error if it is more than was allowed at export.
    """
    # Where Triton will place ONNX Runtime: on a GPU if there is one, unless the config says
    # KIND_CPU.
    kinds = {group.kind for group in encoder.config.instance_group}
    on_cpu = runtime == encoder.runtime and model_config_pb2.ModelInstanceGroup.KIND_CPU in kinds
    device = None
    if runtime != "openvino" and not on_cpu:
        try:
            find_gpu()
            device = 0
        except RAdapterError:
            device = None

    distance = 0.0
    for version in encoder.versions:
        name = f"{encoder.name} of release {version}, run by {runtime} on this machine,"
        graph = EncoderGraph(
            encoder.file(version, runtime),
            runtime,
            precision=encoder.facts.precision,
            threads=threads,
            device=device,
        )
        agreement = compare(name, graph, Samples.load(encoder.folder / str(version)), None)
        if not agreement.within(encoder.bounds):
            raise RAdapterError(
                f"{name} differs from torch by up to {agreement.max_error:.2e} (1 - cosine up to "
                f"{1 - agreement.min_cosine:.1e}), and {encoder.bounds} is allowed"
            )
        distance = max(distance, 1 - agreement.min_cosine)
    return distance
