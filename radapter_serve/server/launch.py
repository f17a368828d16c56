"""What tritonserver is started with: a folder of its own, a command line, and an environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from radapter_serve.environment import INDEXES, LABELS, LABELS_FILE, SURPLUS
from radapter_serve.files import staged
from radapter_serve.release.repository import CONFIG
from radapter_serve.server.control import SECRET_HEADER
from radapter_serve.server.installation import Installation
from radapter_serve.server.models import ModelEntry
from radapter_serve.server.processes import ending_with_parent, shm_prefix
from radapter_serve.threads import environment

WAITING = "surplus"  # what the processes of models are to refuse, a file for each model
MODELS = (  # Triton loads what is in this folder of a server, and nothing next to it
    "models"
)
# What a caller could read or change the server's memory, files and log by; open to who sends the
# secret of this server.
_RESTRICTED = "shared-memory,model-repository,trace,logging"
# Spans of the requests that bring a `traceparent`, to where OTEL_EXPORTER_OTLP_ENDPOINT says.
_TRACING = (
    "mode=opentelemetry",
    "level=TIMESTAMPS",
    "rate=0",
    "count=-1",
    "opentelemetry,resource=service.name=radapter-triton",
)
# How long it waits for a collector, also when it stops, in its own notation; else 10 s.
_COLLECTOR_TIMEOUT = "2s"
_RESTRICTING = ("http-restricted-api", "grpc-restricted-protocol")


def lay_out(
    folder: Path, installation: Installation, repository: Path, models: Mapping[str, ModelEntry]
) -> None:
    """Fill a server's folder with links to its backends and models, and with the configs that this
    machine needs.

    Args:
        folder: of the server.
        installation: its backends.
        repository: the model repository.
        models: what to serve.
    """
    backends = folder / "backends"
    backends.mkdir()
    installation.assemble(backends)
    (folder / MODELS).mkdir()
    (folder / WAITING).mkdir()
    for name, model in models.items():
        put(folder, repository, name, model)


def put(folder: Path, repository: Path, name: str, model: ModelEntry | None) -> None:
    """Let a model's folder in the server's hold what Triton is to load next; nothing if there is no
    model.
    """
    target = folder / MODELS / name
    versions = set() if model is None else {str(one) for one in model.versions}
    for path in target.glob("*"):
        if path.name.isdecimal() and path.name not in versions:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    if model is None:
        shutil.rmtree(target, ignore_errors=True)
        return
    target.mkdir(exist_ok=True)
    for version in versions:
        if not (target / version).exists():
            _link(repository / name / version, target / version)
    with staged(target / CONFIG) as path:
        path.write_text(model.config, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    if not (source / "model.py").exists():
        target.symlink_to(source)
        return
    target.mkdir()
    # Python would write its own files next to model.py, and Triton would take that for another
    # version of the code.
    (target / "__pycache__").touch()
    for path in source.iterdir():
        if path.name != "__pycache__":
            (target / path.name).symlink_to(path)


def command_line(
    folder: Path,
    installation: Installation,
    endpoint_flags: Sequence[str],
    secret: str,
    *,
    exit_timeout: int,
    version_compatible: bool,
    traced: bool = False,
) -> list[str]:
    """The program and its arguments, but for the models to load, for a folder that `lay_out`
    filled.

    Args:
        folder: of the server.
        installation: what to start.
        endpoint_flags: where it listens.
        secret: opens what callers may not reach.
        exit_timeout: seconds that it waits for calls under way when it is stopped.
        version_compatible: whether engines of TensorRT bring a runtime of their own, code that must
            be allowed.
        traced: whether it sends spans.
    """
    arguments = [
        str(installation.binary),
        f"--model-repository={folder / MODELS}",
        f"--backend-directory={folder / 'backends'}",
        *([f"--cache-directory={installation.caches}"] if installation.caches else []),
        *endpoint_flags,
        # which takes models, and with them code, from anyone who has the secret
        "--model-control-mode=explicit",
        *(f"--{flag}={_RESTRICTED}:{SECRET_HEADER}={secret}" for flag in _RESTRICTING),
        # configs of an export are complete; this halves the start
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={exit_timeout}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(folder)}",
        *(["--backend-config=tensorrt,version-compatible=true"] if version_compatible else []),
        *(f"--trace-config={setting}" for setting in _TRACING if traced),
    ]
    return ending_with_parent(arguments)


def server_environment(
    installation: Installation, folder: Path, indexes: Path, threads: int
) -> dict[str, str]:
    """The variables of the server's processes."""
    # The model processes take their Python from the first python3 on PATH.
    first = {"LD_LIBRARY_PATH": [*installation.libraries], "PATH": [Path(sys.executable).parent]}
    variables = {
        **os.environ,
        **environment(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(folder),  # ONNX Runtime leaves a file there
        INDEXES: str(indexes),
        SURPLUS: str(folder / WAITING),
        LABELS: str(folder / LABELS_FILE),
    }
    if "OTEL_EXPORTER_OTLP_TIMEOUT" not in variables:
        variables.setdefault("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", _COLLECTOR_TIMEOUT)
    for name, folders in first.items():
        given = [Path(folder) for folder in variables.get(name, "").split(":") if folder]
        # Relative ones would start from the server's own folder.
        variables[name] = ":".join(str(folder.absolute()) for folder in folders + given)
    return variables
