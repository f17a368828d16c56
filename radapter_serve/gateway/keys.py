"""API keys: a file of names, SHA-256 digests and limits, so that no one can log in with the file
alone.
"""

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
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # which Windows lacks, as it lacks such pipes
_LINE = re.compile(r"([\w.@-]{1,64}):\s*([0-9a-f]{64})((?:\s+[a-z_]+=\S+)*)")


@dataclass(frozen=True)
class Key:
    """One key of a file; None is no limit."""

    name: str  # of who has it
    digest: str  # SHA-256, in hex
    requests_per_second: float | None = None  # inferences that it may send
    at_once: int | None = None  # inferences that it may have under way
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


# How the text of each limit is read, and an example.
_LIMITS: dict[str, tuple[Callable[[str], object], str]] = {
    "requests_per_second": (_positive, "10"),
    "at_once": (_count, "4"),
    "images_per_minute": (_positive, "600"),
    "until": (date.fromisoformat, "2027-12-31"),
}


def _today() -> date:
    return datetime.now(timezone.utc).date()


class Keys:
    """The keys of a file, read again whenever it changes: a line `name: digest` each, which limits
    such as `at_once=4` may follow.

    With a file that has become unreadable no caller is let in: a revoked key must never work
    again.
    """

    def __init__(self, path: Path, today: Callable[[], date] = _today) -> None:
        self._path = path
        self._today = today
        self._seen: object = _state(path)
        self._keys = _read(path)

    def check(self, authorization: str | None) -> Key:
        """Let a caller in by the header `Authorization: Bearer KEY`, or raise `Refused`."""
        if (state := _state(self._path)) != self._seen:
            self._seen = state
            try:
                self._keys = _read(self._path)
                LOG.info("%s has changed: %d keys", self._path, len(self._keys))
            except RAdapterError as error:
                self._keys = {}
                LOG.error("no key is accepted: %s", error)
        kind, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest()
        # Every digest is compared, so that the time tells nothing.
        found = [key for key in self._keys.values() if hmac.compare_digest(given, key.digest)]
        if kind.lower() != "bearer" or not found:
            raise Refused(
                401,
                UNAUTHORIZED,
                "send the header Authorization: Bearer KEY, with a key of this gateway",
            )
        until = found[0].until
        if until is not None and self._today() > until:
            raise Refused(401, UNAUTHORIZED, f"this key ended with {until}; ask for another")
        return found[0]


def new_key(path: Path, name: str) -> str:
    """Make a key and append its digest to a file, which is made where there is none; the key is
    kept nowhere.
    """
    if not _LINE.fullmatch(f"{name}: {'0' * 64}"):
        raise RAdapterError(f"--new-key {name!r}: a name has 1 to 64 letters, digits and . _ @ -")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        before = _text(path) if path.exists() else ""
        if name in _parse(path, before):
            raise RAdapterError(
                f"{path} has a key {name} already; take its line out first, or choose another name"
            )
        line = f"{name}: {hashlib.sha256(key.encode()).hexdigest()}\n"
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        with staged(path) as file:
            file.write_text(
                before + ("" if before.endswith("\n") or not before else "\n") + line,
                encoding="utf-8",
            )
        path.chmod(mode)
    except OSError as error:
        raise RAdapterError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or reason(error)}"
        ) from None
    return key


def _text(path: Path) -> str:
    """The text of a file of keys; a pipe, a device or a folder is refused at once."""
    try:
        # Opening a pipe without a writer would else block.
        with open(os.open(path, _READ), encoding="utf-8") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RAdapterError(
                    f"cannot read the keys {path}: it is no plain file; give --api-keys FILE"
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise RAdapterError(
            f"cannot read the keys {path}: {why}; make a key with: radapter-gateway --api-keys"
            f" {path} --new-key NAME"
        ) from None


def _read(path: Path) -> dict[str, Key]:
    return _parse(path, _text(path))


def _parse(path: Path, text: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        found = _LINE.fullmatch(line)
        if not found or found[1] in keys:
            raise RAdapterError(
                f"{where}: each line is `name: SHA-256 in hex`, which limits such as at_once=4 may"
                " follow, and no name comes twice"
            )
        keys[found[1]] = Key(found[1], found[2], **_limits(where, found[3].split()))
    return keys


def _limits(where: str, words: list[str]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in _LIMITS or name in limits:
            raise RAdapterError(
                f"{where}: {name} is no limit, or comes twice; there are {', '.join(_LIMITS)}"
            )
        read, example = _LIMITS[name]
        try:
            limits[name] = read(text)
        except ValueError:
            raise RAdapterError(f"{where}: {word} won't do; write {name}={example}") from None
    return limits


def _state(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
