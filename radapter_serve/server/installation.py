"""Finds tritonserver: NVIDIA's own on PATH, else that of the wheel nvidia-pytriton."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.errors import RAdapterError, install_command

OUR_BACKENDS = Path(__file__).absolute().parents[1] / "triton" / "backends"


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started."""

    binary: Path
    backends: dict[str, Path]  # folders by name; ours where the server lacks one
    caches: Path | None = None  # folder of response caches
    libraries: tuple[Path, ...] = ()  # folders for LD_LIBRARY_PATH
    stub: Path | None = None  # runs Python models, if it is not with the Python backend

    @property
    def in_python(self) -> list[str]:
        """Backends whose models run in processes of their own."""
        ours = [name for name, path in self.backends.items() if path.parent == OUR_BACKENDS]
        return ["python", *ours]

    def assemble(self, folder: Path) -> None:
        """Make a backend directory of links, and of a copy of the Python backend, as Triton
        insists.
        """
        for name, source in self.backends.items():
            if name == "python":
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (folder / name).symlink_to(source)
        if self.stub is not None:
            shutil.copy(self.stub, folder / "python")


def find_tritonserver() -> Installation:
    """Find `tritonserver` on PATH, else in nvidia-pytriton; raise an error if there is none that
    works with this Python and numpy.
    """
    if (binary := shutil.which("tritonserver")) is not None:
        return _on_path(Path(binary).resolve())

    # The wheel's Python backend misreads tensors under numpy 2.
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        raise RAdapterError(
            f"numpy {numpy} is installed, but Triton's Python backend misreads tensors under numpy"
            f" 2; {_advice()}"
        )
    if sys.version_info >= (3, 13):
        raise RAdapterError(
            f"this is {_python()}, for which there is no numpy below 2, as Triton needs;"
            f" {_advice()}"
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise RAdapterError(
            f"tritonserver is neither on PATH nor installed with nvidia-pytriton; {_advice()}"
        )

    package = Path(spec.submodule_search_locations[0]).absolute()
    server = package / "tritonserver"
    stubs = server / "python_backend_stubs" / _python().removeprefix("Python ")
    stub = stubs / "triton_python_backend_stub"
    if not (server / "bin" / "tritonserver").exists() or not stub.exists():
        raise RAdapterError(
            f"nvidia-pytriton at {package} brings no server for {_python()}; {_advice()}"
        )

    # Its stub is linked against the shared library of Python.
    library = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = libdir / (sysconfig.get_config_var("MULTIARCH") or "")
    is_there = any((folder / f"lib{library}.so.1.0").exists() for folder in (libdir, multiarch))
    if not is_there and ctypes.util.find_library(library) is None:
        raise RAdapterError(
            f"lib{library}.so.1.0 is missing, which Triton's Python backend needs; install the"
            f" shared library of {_python()}"
        )
    return Installation(
        server / "bin" / "tritonserver",
        {"python": server / "backends" / "python", **our_backends()},
        server / "caches",
        (package.parent / "nvidia_pytriton.libs", libdir),
        stub,
    )


def our_backends() -> dict[str, Path]:
    """Folders of the backends in Python that come with this package, by name."""
    return {model.parent.name: model.parent for model in OUR_BACKENDS.glob("*/model.py")}


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
            f"the Python backend of {binary} is for {needed}, this is {_python()};"
            f" install radapter-serve under {needed} and start again"
        )
    for name, ours in our_backends().items():
        if not (backends.get(name, folder) / f"libtriton_{name}.so").exists():
            backends[name] = ours
    return Installation(binary, backends)


def _python() -> str:
    return f"Python {sys.version_info[0]}.{sys.version_info[1]}"


def _advice() -> str:
    return (
        f"with Python 3.10 to 3.12 on Linux, {install_command('triton')}; or use NVIDIA's Triton"
        " container, or radapter-serve --engine process, which needs no Triton"
    )
