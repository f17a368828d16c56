"""API keys: a file of names and SHA-256 digests, so that no one can log in with the file alone."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from pathlib import Path

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import staged
from radapter_serve.gateway.errors import UNAUTHORIZED, Refused

LOG = logging.getLogger("radapter-gateway")
PREFIX = "radapter-"
_LINE = re.compile(r"([\w.@-]{1,64}):\s*([0-9a-f]{64})")


class Keys:
    """The keys of a file, read again whenever it changes.

    With a file that has become unreadable no caller is let in: a revoked key must never work
    again.

    Args:
        path: a line `name: digest` for each key; empty lines and lines that begin with # count as
            none.

    Raises:
        RAdapterError: the file cannot be read, or has a line that is no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: object = _state(path)
        self._digests = _read(path)

    def check(self, authorization: str | None) -> None:
        """Let a caller in by the header `Authorization: Bearer KEY`.

        Raises:
            Refused: no key, or none of the file's.
        """
        if (state := _state(self._path)) != self._seen:
            self._seen = state
            try:
                self._digests = _read(self._path)
                LOG.info("%s has changed: %d keys", self._path, len(self._digests))
            except RAdapterError as error:
                self._digests = {}
                LOG.error("no key is accepted: %s", error)
        kind, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest()
        # Every digest is compared, so that the time tells nothing.
        if kind.lower() != "bearer" or not sum(
            hmac.compare_digest(given, known) for known in self._digests.values()
        ):
            raise Refused(
                401,
                UNAUTHORIZED,
                "send the header Authorization: Bearer KEY, with a key of this gateway",
            )


def new_key(path: Path, name: str) -> str:
    """Make a key and append its digest to a file, which is made where there is none; the key is
    kept nowhere.

    Raises:
        RAdapterError: a name that is not allowed or is taken; a file that cannot be read or
            written.
    """
    if not _LINE.fullmatch(f"{name}: {'0' * 64}"):
        raise RAdapterError(f"--new-key {name!r}: a name has 1 to 64 letters, digits and . _ @ -")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        before = _text(path) if path.exists() else ""
        if name in _digests(path, before):
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
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:  # noqa: PTH123
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


def _read(path: Path) -> dict[str, str]:
    return _digests(path, _text(path))


def _digests(path: Path, text: str) -> dict[str, str]:
    digests: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found or found[1] in digests:
            raise RAdapterError(
                f"{path}, line {number}: each line is `name: SHA-256 in hex`, and no name comes"
                " twice"
            )
        digests[found[1]] = found[2]
    return digests


def _state(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
