"""Launches tritonserver: its installation, folder, command line, environment and log."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radapter_serve.errors import RAdapterError, install_command
from radapter_serve.files import disk_errors, hold, write_text
from radapter_serve.process import INDEXES, SURPLUS, environment, otlp_endpoint
from radapter_serve.release.repository import CONFIG, RUNTIMES

if TYPE_CHECKING:
    from radapter_serve.server.config import ServerConfig
    from radapter_serve.server.models import ModelEntry

# The backend in Python of this package, by the names for which it stands in.
OUR_BACKENDS = dict.fromkeys(RUNTIMES, Path(__file__).absolute().parents[1] / "triton" / "backend")
FOLDER_PREFIX = "radapter-serve-"
# In a server's folder: the files that say how many requests a model is to reject, and the models
# that Triton may load.
SURPLUS_FOLDER = "surplus"
MODELS_FOLDER = "models"
SECRET_HEADER = "radapter-secret"
_PYTHON = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
DISK_ADVICE = "free some space, or set TMPDIR to another"
# Protocols that can read or change the server's memory, files and log: they require the secret of
# this server.
_RESTRICTED = "shared-memory,model-repository,trace,logging"
# Trace requests with a `traceparent`; spans go to OTEL_EXPORTER_OTLP_ENDPOINT.
_TRACING = (
    "mode=opentelemetry",
    "level=TIMESTAMPS",
    "rate=0",
    "count=-1",
    "opentelemetry,resource=service.name=radapter-triton",
)
# Starts a program that is killed when the thread that starts it ends. SIGTERM would leave the
# server's ports in use for as long as a caller keeps a connection open.
_LAUNCHER = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])"""


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started."""

    binary: Path
    backends: dict[str, Path]  # folders by name; ours where the server lacks the backend
    libraries: tuple[Path, ...] = ()  # folders for LD_LIBRARY_PATH
    stub: Path | None = None  # runs Python models, if not in the Python backend's folder

    @property
    def in_python(self) -> list[str]:
        """Backends whose models run in separate processes."""
        ours = [name for name, path in self.backends.items() if path == OUR_BACKENDS.get(name)]
        return ["python", *ours]


def find_tritonserver() -> Installation:
    """Find a `tritonserver` that works with this Python: on PATH, else in nvidia-pytriton."""
    if (binary := shutil.which("tritonserver")) is not None:
        return _on_path(Path(binary).resolve())

    # The wheel's Python backend misreads tensors under numpy 2.
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        raise RAdapterError(
            f"numpy {numpy} is installed, but Triton's Python backend misreads tensors under numpy"
            f" 2; {_advice()}"
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise RAdapterError(
            f"tritonserver is neither on PATH nor installed with nvidia-pytriton; {_advice()}"
        )

    package = Path(spec.submodule_search_locations[0]).absolute()
    server = package / "tritonserver"
    stubs = server / "python_backend_stubs" / _PYTHON.removeprefix("Python ")
    stub = stubs / "triton_python_backend_stub"
    if not (server / "bin" / "tritonserver").exists() or not stub.exists():
        raise RAdapterError(
            f"nvidia-pytriton at {package} brings no server for {_PYTHON}; {_advice()}"
        )

    # The wheel's stub is linked against the shared library of Python.
    library = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = libdir / (sysconfig.get_config_var("MULTIARCH") or "")
    is_there = any((folder / f"lib{library}.so.1.0").exists() for folder in (libdir, multiarch))
    if not is_there and ctypes.util.find_library(library) is None:
        raise RAdapterError(
            f"lib{library}.so.1.0 is missing, which Triton's Python backend needs; install the"
            f" shared library of {_PYTHON}"
        )
    return Installation(
        server / "bin" / "tritonserver",
        {"python": server / "backends" / "python", **OUR_BACKENDS},
        (package.parent / "nvidia_pytriton.libs", libdir),
        stub,
    )


def _on_path(binary: Path) -> Installation:
    folder = binary.parent.parent / "backends"
    backends = {}
    if folder.is_dir():
        backends = {path.name: path for path in folder.iterdir() if path.is_dir()}
    if "python" not in backends:
        raise RAdapterError(f"{binary} has no Python backend in {folder}; {_advice()}")
    stub = backends["python"] / "triton_python_backend_stub"
    built_for = re.search(rb"libpython3\.(\d+)", stub.read_bytes()) if stub.exists() else None
    if built_for and int(built_for[1]) != sys.version_info[1]:
        needed = f"Python 3.{int(built_for[1])}"
        raise RAdapterError(
            f"the Python backend of {binary} is for {needed}, this is {_PYTHON};"
            f" install radapter-serve under {needed} and start again"
        )
    for name, ours in OUR_BACKENDS.items():
        if not (backends.get(name, folder) / f"libtriton_{name}.so").exists():
            backends[name] = ours
    return Installation(binary, backends)


def _advice() -> str:
    return (
        f"with Python 3.10 to 3.12 on Linux, {install_command('triton')}; or use NVIDIA's Triton"
        " container, or radapter-serve --engine process, which needs no Triton"
    )


@contextlib.contextmanager
def server_folder() -> Iterator[Path]:
    """Make a folder for a server, which only its owner can read, and lock it for the block; the
    folders of killed servers are removed first.
    """
    parent = Path(tempfile.gettempdir())
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        # Skip folders of other users, and new ones: these are not locked yet, and have no models.
        with contextlib.suppress(OSError):
            if (folder / MODELS_FOLDER).is_dir():
                with hold(folder):
                    _remove(folder)
    with disk_errors(parent, DISK_ADVICE):
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    with contextlib.ExitStack() as stack:
        with disk_errors(parent, DISK_ADVICE):
            stack.enter_context(hold(folder))
            stack.callback(_remove, folder)
            (folder / MODELS_FOLDER).mkdir()  # shows a folder without a lock to be left over
        yield folder


def _remove(folder: Path) -> None:
    hide_shared_memory(folder)
    shutil.rmtree(folder, ignore_errors=True)


def shm_prefix(folder: Path) -> str:
    """Prefix of a server's shared-memory files."""
    return folder.name.replace("-", "_") + "_"


def hide_shared_memory(folder: Path) -> None:
    """Unlink a server's files in /dev/shm: its processes keep them open, others cannot."""
    for file in Path("/dev/shm").glob(f"{shm_prefix(folder)}*"):
        file.unlink(missing_ok=True)


def lay_out(
    folder: Path, installation: Installation, repository: Path, models: Mapping[str, ModelEntry]
) -> None:
    """Fill a server's folder with its backends and models, and the configs for this machine."""
    # Link the backends, except the Python backend, of which Triton requires a copy.
    backends = folder / "backends"
    backends.mkdir()
    for name, source in installation.backends.items():
        if name == "python":
            shutil.copytree(source, backends / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (backends / name).symlink_to(source)
    if installation.stub is not None:
        shutil.copy(installation.stub, backends / "python")
    (folder / SURPLUS_FOLDER).mkdir()
    for name, model in models.items():
        put(folder, repository, name, model)


def put(folder: Path, repository: Path, name: str, model: ModelEntry | None) -> None:
    """Update a model's folder to the versions and config to load next; None removes it."""
    target = folder / MODELS_FOLDER / name
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
        # A file with the name of the folder in which Python would cache model.py: Triton would take
        # the folder for a change of the code.
        (target / version / "__pycache__").touch()
        for path in source.iterdir():
            if path.name != "__pycache__":
                (target / version / path.name).symlink_to(path)
    write_text(target / CONFIG, model.config)


def command_line(
    folder: Path,
    installation: Installation,
    config: ServerConfig,
    secret: str,
    models: Collection[str],
) -> list[str]:
    """Command line of the server."""
    arguments = [
        str(installation.binary),
        f"--model-repository={folder / MODELS_FOLDER}",
        f"--backend-directory={folder / 'backends'}",
        *config.endpoints.flags(),
        # Loading a model can load code, so it requires the secret.
        "--model-control-mode=explicit",
        f"--http-restricted-api={_RESTRICTED}:{SECRET_HEADER}={secret}",
        f"--grpc-restricted-protocol={_RESTRICTED}:{SECRET_HEADER}={secret}",
        # The configs of an export are complete; without completion the start takes half as long.
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={config.drain_seconds}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(folder)}",
        *(f"--load-model={model}" for model in models),
    ]
    if otlp_endpoint() is not None:
        arguments += [f"--trace-config={setting}" for setting in _TRACING]
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *arguments]


def server_environment(
    folder: Path, installation: Installation, config: ServerConfig
) -> dict[str, str]:
    """Environment variables of the server's processes."""
    variables = {
        **os.environ,
        **environment(config.encoder_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(folder),  # ONNX Runtime leaves a file there
        INDEXES: str(config.indexes),
        SURPLUS: str(folder / SURPLUS_FOLDER),
    }
    if "OTEL_EXPORTER_OTLP_TIMEOUT" not in variables:
        # Limits the wait for a collector, also at the server's end; 10 s if unset.
        variables.setdefault("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2s")
    # Model processes run the first python3 on PATH.
    first = {"LD_LIBRARY_PATH": installation.libraries, "PATH": (Path(sys.executable).parent,)}
    for name, folders in first.items():
        others = [Path(path) for path in variables.get(name, "").split(":") if path]
        # Relative paths would start from the server's folder.
        variables[name] = ":".join(str(path.absolute()) for path in (*folders, *others))
    return variables


def reason_in(log: str) -> str:
    """The line of a server's log that explains a failure best."""
    # Without a GPU, the server complains of three libraries.
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


def hide_argument(pid: int, secret: str) -> None:
    """Overwrite a secret in a child's command line, which all can read, if the kernel allows it."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # Fields 48 and 49 of proc_pid_stat(5) are the bounds of the arguments; field 2, a name,
        # may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start = int(fields[45])
        end = int(fields[46])
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(secret.encode(), b" " * len(secret)))
