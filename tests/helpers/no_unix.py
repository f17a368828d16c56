"""radapter-serve as far as possible as on Windows: without the modules, signals and sockets that
are Unix's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys

import psutil  # noqa: F401 - before `resource` goes: on Linux psutil needs it, on Windows not

for name in ("fcntl", "resource", "termios", "pwd", "grp", "uvloop"):
    sys.modules[name] = None  # type: ignore[assignment]  # so that an import of it fails
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
del signal.SIGHUP
del os.O_NONBLOCK
shutil._use_fd_functions = False  # type: ignore[attr-defined]  # which need that flag from 3.13 on


from radapter_serve.cli.release import main as release  # noqa: E402
from radapter_serve.cli.serve import main as serve  # noqa: E402

if __name__ == "__main__":
    command = {"serve": serve, "release": release}[sys.argv[1]]
    sys.exit(command(sys.argv[2:]))
