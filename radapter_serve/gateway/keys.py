"""API keys: a file of names, SHA-256 digests and limits; the keys themselves are stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import staged
from radapter_serve.gateway.errors import UNAUTHORIZED, Refused

LOG = logging.getLogger("radapter-gateway")
PREFIX = "radapter-"
_LINE = re.compile(r"([\w.@-]{1,64}):\s*([0-9a-f]{64})((?:\s+[a-z_]+=\S+)*)")


@dataclass(frozen=True)
class Key:
    """One key of a file; None is no limit."""

    name: str  # of its owner
    digest: str  # SHA-256, in hex
    requests_per_second: float | None = None
    at_once: int | None = None  # inferences under way
    images_per_minute: float | None = None
    until: date | None = None  # the last day, in UTC, on which it works


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise ValueError
    return number


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ValueError
    return int(text)


# How to read each limit, and an example.
_LIMITS: dict[str, tuple[Callable[[str], object], str]] = {
    "requests_per_second": (_positive, "10"),
    "at_once": (_count, "4"),
    "images_per_minute": (_positive, "600"),
    "until": (date.fromisoformat, "2027-12-31"),
}


def _today() -> date:
    return datetime.now(timezone.utc).date()


class Keys:
    """The keys of a file, which is read again when it changes. An unreadable file lets in nobody:
    a revoked key must never work again.
    """

    def __init__(self, path: Path, today: Callable[[], date] = _today) -> None:
        self._path = path
        self._today = today
        self._state = _state(path)
        self._keys = _parse(path, _text(path))

    def check(self, authorization: str | None) -> Key:
        """The key of the header `Authorization: Bearer KEY`; raises `Refused` without one."""
        if (state := _state(self._path)) != self._state:
            self._state = state
            try:
                self._keys = _parse(self._path, _text(self._path))
                LOG.info("%s has changed: %d keys", self._path, len(self._keys))
            except RAdapterError as error:
                self._keys = {}
                LOG.error("no key is accepted: %s", error)
        kind, _, secret = (authorization or "").partition(" ")
        digest = hashlib.sha256(secret.strip().encode("utf-8", "replace")).hexdigest()
        # Compares with every digest, so that the time tells nothing.
        keys = [key for key in self._keys.values() if hmac.compare_digest(digest, key.digest)]
        if kind.lower() != "bearer" or not keys:
            raise Refused(
                401,
                UNAUTHORIZED,
                "send the header Authorization: Bearer KEY, with a key of this gateway",
            )
        until = keys[0].until
        if until is not None and self._today() > until:
            raise Refused(401, UNAUTHORIZED, f"this key ended with {until}; ask for another")
        return keys[0]


def new_key(path: Path, name: str) -> str:
    """Make a key, and append its digest to a new or an existing file."""
    if not _LINE.fullmatch(f"{name}: {'0' * 64}"):
        raise RAdapterError(f"--new-key {name!r}: a name has 1 to 64 letters, digits and . _ @ -")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        before = _text(path) if path.exists() else ""
        if name in _parse(path, before):
            raise RAdapterError(
                f"{path} has a key {name} already; take its line out first, or choose another name"
            )
        if before and not before.endswith("\n"):
            before += "\n"
        line = f"{name}: {hashlib.sha256(key.encode()).hexdigest()}\n"
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        with staged(path) as file:
            file.write_text(before + line, encoding="utf-8")
        path.chmod(mode)
    except OSError as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise RAdapterError(f"cannot write {path}: {why}") from None
    return key


def _text(path: Path) -> str:
    """Read a file of keys; a pipe, a device or a folder is refused at once."""
    try:
        # Opening a pipe without a writer would block; Windows lacks the flag, and such pipes.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(path, flags), encoding="utf-8") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RAdapterError(
                    f"cannot read the keys {path}: it is not a plain file; give --api-keys FILE"
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise RAdapterError(
            f"cannot read the keys {path}: {why}; make a key with: radapter-gateway --api-keys"
            f" {path} --new-key NAME"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        match = _LINE.fullmatch(line)
        if not match or match[1] in keys:
            raise RAdapterError(
                f"{where}: each line is `name: SHA-256 in hex`, which limits such as at_once=4 may"
                " follow, and no name comes twice"
            )
        limits: dict[str, Any] = {}
        for word in match[3].split():
            name, _, value = word.partition("=")
            if name not in _LIMITS or name in limits:
                raise RAdapterError(
                    f"{where}: {name} is not a limit, or comes twice; there are"
                    f" {', '.join(_LIMITS)}"
                )
            read, example = _LIMITS[name]
            try:
                limits[name] = read(value)
            except ValueError:
                raise RAdapterError(f"{where}: {word} is invalid; write {name}={example}") from None
        keys[match[1]] = Key(match[1], match[2], **limits)
    return keys


def _state(path: Path) -> object:
    """Facts that change with a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
