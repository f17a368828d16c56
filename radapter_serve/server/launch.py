"""The folder, the command line and the environment of a tritonserver, and the line of its log that
says why it failed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from radapter_serve.files import staged
from radapter_serve.process import INDEXES, LABELS, LABELS_FILE, SURPLUS, environment, otlp_endpoint
from radapter_serve.release.repository import CONFIG
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.control import SECRET_HEADER
from radapter_serve.server.installation import Installation
from radapter_serve.server.models import ModelEntry
from radapter_serve.server.processes import ending_with_parent, shm_prefix

WAITING = "surplus"  # folder of the files that say how many requests a model is to reject
MODELS = "models"  # folder of what Triton may load, in a server's folder
# A caller could read or change the server's memory, files and log by these, so they ask for the
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


def lay_out(
    folder: Path, installation: Installation, repository: Path, models: Mapping[str, ModelEntry]
) -> None:
    """Fill a server's folder with links to its backends and models, and with the configs for this
    machine.
    """
    (folder / "backends").mkdir()
    installation.assemble(folder / "backends")
    (folder / WAITING).mkdir()
    for name, model in models.items():
        put(folder, repository, name, model)


def put(folder: Path, repository: Path, name: str, model: ModelEntry | None) -> None:
    """Make a model's folder in the server's hold what Triton is to load next; None removes it."""
    target = folder / MODELS / name
    versions = set() if model is None else {str(version) for version in model.versions}
    for path in target.glob("*"):
        if path.name.isdecimal() and path.name not in versions:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    if model is None:
        shutil.rmtree(target, ignore_errors=True)
        return
    target.mkdir(parents=True, exist_ok=True)
    for version in versions:
        source = repository / name / version
        if (target / version).exists():
            continue
        if not (source / "model.py").exists():
            (target / version).symlink_to(source)
            continue
        (target / version).mkdir()
        # A file in the place of the folder into which Python would compile model.py: Triton would
        # take that for another version of the code.
        (target / version / "__pycache__").touch()
        for path in source.iterdir():
            if path.name != "__pycache__":
                (target / version / path.name).symlink_to(path)
    with staged(target / CONFIG) as path:
        path.write_text(model.config, encoding="utf-8")


def command_line(
    folder: Path,
    installation: Installation,
    config: ServerConfig,
    secret: str,
    models: Collection[str],
    *,
    version_compatible: bool,
) -> list[str]:
    """The program and its arguments, for a folder that `lay_out` filled.

    `version_compatible` allows TensorRT engines to bring their runtime, which is code.
    """
    arguments = [
        str(installation.binary),
        f"--model-repository={folder / MODELS}",
        f"--backend-directory={folder / 'backends'}",
        *config.endpoints.flags(),
        # The secret lets its owner load models, and with them code.
        "--model-control-mode=explicit",
        f"--http-restricted-api={_RESTRICTED}:{SECRET_HEADER}={secret}",
        f"--grpc-restricted-protocol={_RESTRICTED}:{SECRET_HEADER}={secret}",
        # The configs of an export are complete; this halves the start.
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={config.drain_seconds}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(folder)}",
        *(f"--load-model={model}" for model in models),
    ]
    if installation.caches:
        arguments.append(f"--cache-directory={installation.caches}")
    if version_compatible:
        arguments.append("--backend-config=tensorrt,version-compatible=true")
    if otlp_endpoint() is not None:
        arguments += [f"--trace-config={setting}" for setting in _TRACING]
    return ending_with_parent(arguments)


def server_environment(
    folder: Path, installation: Installation, config: ServerConfig
) -> dict[str, str]:
    """Variables of the server's processes."""
    variables = {
        **os.environ,
        **environment(config.encoder_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(folder),  # ONNX Runtime leaves a file there
        INDEXES: str(config.indexes),
        SURPLUS: str(folder / WAITING),
        LABELS: str(folder / LABELS_FILE),
    }
    if "OTEL_EXPORTER_OTLP_TIMEOUT" not in variables:
        # How long it waits for a collector, also when it stops; 10 s if unset.
        variables.setdefault("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2s")
    # The model processes take their Python from the first python3 on PATH.
    first = {"LD_LIBRARY_PATH": installation.libraries, "PATH": (Path(sys.executable).parent,)}
    for name, folders in first.items():
        others = [Path(path) for path in variables.get(name, "").split(":") if path]
        # Relative paths would start from the server's folder.
        variables[name] = ":".join(str(path.absolute()) for path in (*folders, *others))
    return variables


def reason(log: str) -> str:
    """The line of a server's log that says best why it failed: a model that did not load, else the
    last error.
    """
    # Without a GPU it complains of three libraries.
    lines = [line for line in log.splitlines() if not re.search("CudaDriver|NVML|DCGM", line)]
    errors = [line for line in lines if re.match(r"[EF]\d{4} ", line)]
    best = (
        [line for line in errors if "failed to load" in line]
        or errors
        or [line for line in lines if line.strip()]
    )
    if not best:
        return "it wrote nothing"
    return re.sub(r"^[EF]\d{4} \S+ +\d+ \S+\] ", "", best[-1]).strip().strip('"')
