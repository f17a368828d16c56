"""Which extra of radapter-serve brings a library, and how to add it to this installation."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "radapter-serve"
_CHECKOUT = Path(__file__).resolve().parents[1]
_PACKAGES = {  # by their modules, where these have other names
    "faiss": "faiss-cpu",
    "open_clip": "open-clip-torch",
    "opentelemetry": "opentelemetry-sdk",
    "pytriton": "nvidia-pytriton",
}


def extra_of(module: str, first: str | None = None) -> str:
    """The extra that brings a library, such as "open_clip.model": `first` if it does, else the one
    with the fewest packages, `all` if none does.
    """
    try:
        requirements = requires(NAME) or []
    except PackageNotFoundError:
        return first or "all"
    packages: dict[str, set[str]] = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name and extra:
            packages.setdefault(extra[1], set()).add(re.sub(r"[._-]+", "-", name[0]).lower())
    top = module.partition(".")[0]
    wanted = _PACKAGES.get(top, top.replace("_", "-").lower())
    found = [extra for extra, names in packages.items() if wanted in names]
    if first in found:
        return str(first)
    return min(found, key=lambda extra: (len(packages[extra]), extra), default="all")


def install_command(extra: str) -> str:
    """What to run so that this installation has an extra, or several with commas.

    The package is installed from a folder, a file or a repository. An index of packages is not
    asked for it by its name, which anybody could have published there.
    """
    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        text = json.dumps({"url": _CHECKOUT.as_uri(), "dir_info": {"editable": True}})
    return command(json.loads(text) if text else None, extra)


def command(origin: dict[str, Any] | None, extra: str) -> str:
    """`install_command` for an installation by its `direct_url.json`; None where it came from an
    index.
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
