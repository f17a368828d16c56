"""Finding tritonserver: NVIDIA's own where it is on PATH, else the one of the pytriton wheel."""

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

from radapter_serve.errors import RAdapterError
from radapter_serve.extras import install_command

OUR_BACKENDS = Path(__file__).absolute().parents[1] / "triton" / "backends"


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started.

    Args:
        binary: the program.
        backends: folders of backends by name; ours among them where the server lacks one.
        caches: its folder of response caches, or None.
        libraries: folders for LD_LIBRARY_PATH.
        stub: the program that runs Python models, where it is not with the Python backend.
    """

    binary: Path
    backends: dict[str, Path]
    caches: Path | None = None
    libraries: tuple[Path, ...] = ()
    stub: Path | None = None

    @property
    def in_python(self) -> list[str]:
        """The backends whose models run in processes of their own."""
        return [
            "python",
            *(name for name, folder in self.backends.items() if folder.parent == OUR_BACKENDS),
        ]

    def assemble(self, folder: Path) -> None:
        """Make a backend directory in `folder`: links, and a copy of the Python backend, as Triton
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
    """Find a server: `tritonserver` on PATH, else the one that the wheel nvidia-pytriton brings.

    Raises:
        RAdapterError: there is none, or none that works with this Python and numpy.
    """
    if (found := shutil.which("tritonserver")) is not None:
        return _native(Path(found).resolve())
    _check_environment()
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise RAdapterError(
            f"tritonserver is neither on PATH nor installed with nvidia-pytriton; {_mend()}"
        )
    return _wheel(Path(spec.submodule_search_locations[0]).absolute())


def _native(binary: Path) -> Installation:
    folder = binary.parent.parent / "backends"
    backends = (
        {path.name: path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    )
    if "python" not in backends:
        raise RAdapterError(f"{binary} has no Python backend in {folder}; {_mend()}")
    stub = backends["python"] / "triton_python_backend_stub"
    wanted = re.search(rb"libpython3\.(\d+)", stub.read_bytes()) if stub.exists() else None
    if wanted and int(wanted[1]) != sys.version_info[1]:
        raise RAdapterError(
            f"the Python backend of {binary} is for Python 3.{int(wanted[1])}, this is {_python()};"
            f" install radapter-serve under Python 3.{int(wanted[1])} and start again"
        )
    for name, ours in our_backends().items():
        if not (backends.get(name, folder) / f"libtriton_{name}.so").exists():
            backends[name] = ours
    return Installation(binary, backends)


def _wheel(package: Path) -> Installation:
    server = package / "tritonserver"
    binary = server / "bin" / "tritonserver"
    stub = (
        server
        / "python_backend_stubs"
        / _python().removeprefix("Python ")
        / "triton_python_backend_stub"
    )
    if not binary.exists() or not stub.exists():
        raise RAdapterError(
            f"nvidia-pytriton at {package} brings no server for {_python()}; {_mend()}"
        )
    _check_libpython()
    libdir = sysconfig.get_config_var("LIBDIR")
    return Installation(
        binary,
        {"python": server / "backends" / "python", **our_backends()},
        server / "caches",
        (package.parent / "nvidia_pytriton.libs", *([Path(libdir)] if libdir else [])),
        stub,
    )


def our_backends() -> dict[str, Path]:
    """Folders of the backends in Python that come with this package, by name."""
    return {model.parent.name: model.parent for model in OUR_BACKENDS.glob("*/model.py")}


def _check_environment() -> None:
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        raise RAdapterError(
            f"numpy {numpy} is installed, but Triton's Python backend misreads tensors under numpy"
            f" 2; {_mend()}"
        )
    if sys.version_info >= (3, 13):
        raise RAdapterError(
            f"this is {_python()}, for which there is no numpy below 2, as Triton needs; {_mend()}"
        )


def _check_libpython() -> None:
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    if any((Path(folder) / name).exists() for folder in (libdir, Path(libdir) / multiarch)):
        return
    if ctypes.util.find_library(name.removeprefix("lib").removesuffix(".so.1.0")) is None:
        raise RAdapterError(
            f"{name} is missing, which Triton's Python backend needs; install the shared library of"
            f" {_python()}"
        )


def _python() -> str:
    return f"Python {sys.version_info[0]}.{sys.version_info[1]}"


def _mend() -> str:
    return (
        f"with Python 3.10 to 3.12 on Linux, {install_command('triton')}; or use NVIDIA's Triton"
        " container, or radapter-serve --engine process, which needs no Triton"
    )
