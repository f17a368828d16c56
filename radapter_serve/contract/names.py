"""Names that users give, of indexes and label sets, which become names of files: in any script."""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Iterable

MAX_BYTES = (
    200  # in UTF-8; a file system takes 255, and files that are being written have longer names
)
RULE = (
    "allowed are letters, digits and other signs of any script, but no / and no . or - or blank at"
    " the start"
)
_JOINERS = "\u200c\u200d"  # which scripts and emoji need, though they cannot be seen


def is_name(text: str) -> bool:
    """Whether a text can be a name: up to 200 bytes, nothing that cannot be shown or that means
    something in a path.
    """
    shown = "".join(sign for sign in text if sign not in _JOINERS)
    return (
        shown.isprintable()
        and shown == shown.strip()
        and "/" not in text
        and text[:1] not in ("", ".", "-", *_JOINERS)
        and len(text.encode("utf-8", "surrogatepass")) <= MAX_BYTES
    )


def spellings(name: str) -> list[str]:
    """A name as it is, and as other systems write the same letters: an é is one sign, or an e with
    an accent.
    """
    return list(
        dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])
    )


def known_as(name: str, names: Container[str]) -> str | None:
    """How a name is spelled among names; None where it is none of them."""
    return next((spelling for spelling in spellings(name) if spelling in names), None)


def there_are(names: Iterable[str], how: str) -> str:
    """The end of a refusal of a name: the names that there are, or how one is made."""
    return f"; there are: {', '.join(names) or f'none ({how})'}"
