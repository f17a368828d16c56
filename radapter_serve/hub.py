"""The Hugging Face hub: names, reachability, loading without retries, and its errors for people."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from radapter_serve.errors import reason

# in front of the name of a model
LOCAL = "local-dir:"
HUB = "hf-hub:"
CARD = "README.md"  # of a model, in its folder
TIMEOUT_SECONDS = 5
_SAID = {
    401: "the hub does not know who asks, or has no such repository (401); look at the name, and"
    " log in with: hf auth login",
    403: "the hub does not allow that (403); log in with a token that may, by: hf auth login",
    404: "the hub has nothing of that name (404); look at it, and at the revision",
}


@functools.cache
def unreachable() -> str:
    """Why the hub can't be reached, or "" if it can; asked once a process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # of the library beneath, which differs by version
        return reason(error)
    return ""


@contextmanager
def from_hub_or_cache() -> Iterator[None]:
    """Load from the cache alone within the block, without retries, if the hub can't be reached."""
    if not unreachable():
        yield
        return
    from huggingface_hub import constants

    modules = [(constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:  # which keeps its own copy
        modules.append((sys.modules["datasets"].config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in modules]
    for module, name in modules:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(modules, before, strict=True):
            setattr(module, name, value)


def split_revision(name: str) -> tuple[str, str | None]:
    """The repository and the revision of `NAME` or `NAME@REVISION`, with `hf-hub:` or without."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    return repository, revision or None


def refused(error: BaseException) -> str:
    """Explain an error of the hub's library, with what to do about it."""
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return "that is no name of a repository; write ORGANISATION/NAME"
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return _SAID.get(status, f"the hub answers {status}; try again later")
    if why := unreachable():
        return f"the hub can't be reached ({why}); try again with a connection"
    return reason(error)


def is_absence(error: BaseException | None) -> bool:
    """True if the file is not cached and cannot be downloaded."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = LocalEntryNotFoundError | OfflineModeIsEnabled
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def how_to_bring(repository: str, kind: str = "model", folder: str | None = None) -> str:
    """Advice for a machine without a connection, as the end of a message.

    `kind` is model or dataset; `folder` of the repository is enough where one is named.
    """
    from huggingface_hub import constants

    flag = "" if kind == "model" else " --repo-type dataset"
    if folder is not None:
        flag += f' --include "{folder}/*"'
    return (
        f"on a machine with a connection run `hf download {repository}{flag}`, and copy"
        f" {kind}s--{repository.replace('/', '--')} from its cache into {constants.HF_HUB_CACHE}"
        " here"
    )
