"""How to add what an extra of radapter-serve brings, to the installation that runs."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "radapter-serve"
_CHECKOUT = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """What to run so that this installation has an extra.

    The package is installed from a folder, a file or a repository. An index of packages is not
    asked for it by its name, which anybody could have published there.

    Args:
        extra: one, or several with commas, such as "demo,playground".
    """
    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        text = json.dumps({"url": _CHECKOUT.as_uri(), "dir_info": {"editable": True}})
    return command(json.loads(text) if text else None, extra)


def command(origin: dict[str, Any] | None, extra: str) -> str:
    """`install_command` for an installation of this origin.

    Args:
        origin: what pip wrote about it (`direct_url.json`), or None where it came from an index.
        extra: as above.
    """
    if origin is None:
        return f"install {NAME} again as you did before, with its extra: {NAME}[{extra}]"
    url = origin["url"]
    if "dir_info" in origin:
        target = shlex.quote(f"{unquote(urlsplit(url).path)}[{extra}]")
        return f"run: pip install {'-e ' if origin['dir_info'].get('editable') else ''}{target}"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"run: pip install {shlex.quote(f'{NAME}[{extra}] @ {url}')}"
