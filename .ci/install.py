"""Make an environment, and install this checkout with some extras into it, for the Makefile.

Usage: python3 .ci/install.py FOLDER EXTRAS. What is missing is said in one line. An installation
that was cut off is made anew, as pip takes a package that lacks files for a whole one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

GIGABYTES = 3.0  # of all extras, with torch for CPUs; on Linux pip's torch has CUDA's libraries: 7
ANOTHER = "type the same again with another one, such as PYTHON=python3.12"
OFFLINE = ("could not find a version", "dns error", "error sending request", "connection")


def main(folder: Path, extras: str) -> None:
    # Look at this machine, before anything is written.
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        give_up(f"Python 3.10 to 3.13 is needed, this is {version}; {ANOTHER}")
    try:
        import ensurepip  # noqa: F401  # Debian has it in a package of its own
    except ImportError:
        give_up(
            f"Python {version} lacks its module venv; type apt install python{version}-venv and"
            f" then the same again, or {ANOTHER}"
        )
    place = next(path for path in folder.absolute().parents if path.is_dir())
    no_room = (
        f"the disk of {place} has {shutil.disk_usage(place).free / 1e9:.1f} GB left, and the"
        f" installation needs {GIGABYTES:g}, or 7 with CUDA; make room, or type the same again with"
        " a folder on another disk, such as VENV=/data/venv"
    )
    if not folder.exists() and shutil.disk_usage(place).free < GIGABYTES * 1e9:
        give_up(no_room)

    # Install, beside a mark that stays if this is cut off.
    unfinished = folder / "unfinished"
    if unfinished.exists():
        print(f"{folder} was not finished: it is made anew", flush=True)
        shutil.rmtree(folder)
    log = folder / "install.log"
    print(
        f"installing radapter-serve[{extras}] into {folder}: one to two minutes with a fast"
        f" network, most of it for torch; {log} has the details",
        flush=True,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        python = folder / "bin" / "python"
        if uv := shutil.which("uv"):
            installer = [uv, "pip", "install", "--python", str(python)]
        else:
            # Python compiles what it imports, once.
            installer = [str(python), "-m", "pip", "install", "--no-compile"]
        with log.open("w", encoding="utf-8") as output:
            for command in (
                [sys.executable, "-m", "venv", str(folder)],
                [*installer, "--editable", f".[{extras}]"],
            ):
                done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
                if done.returncode:
                    break
    except KeyboardInterrupt:
        give_up("the installation was interrupted; type the same again, and it is made anew", 130)
    except OSError as error:
        give_up(no_room if error.errno == 28 else f"could not write {folder}: {error.strerror}")

    # Explain a failure. An installer that ends by itself leaves no package half installed, unless
    # the disk was full.
    if done.returncode:
        text = log.read_text(encoding="utf-8", errors="replace").lower()
        if "no space left" in text or "errno 28" in text or "os error 28" in text:
            give_up(no_room)
        unfinished.unlink()
        if any(word in text for word in OFFLINE):
            give_up(
                f"the packages could not be fetched, see {log}; look at the connection, then type"
                " the same again"
            )
        give_up(f"the installation failed, see {log}; then type the same again")
    unfinished.unlink()
    (folder / f"installed-{extras}").touch()


def give_up(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    main(Path(sys.argv[1]), sys.argv[2])
