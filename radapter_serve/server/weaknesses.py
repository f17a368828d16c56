"""Published weaknesses of Triton, and which of them a version has.

SECURITY.md says of each when it reaches a user and what closes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Weakness:
    """One published weakness of tritonserver since 2.51, the newest that pip brings.

    Args:
        name: its number among the Common Vulnerabilities and Exposures.
        fixed: first version of Triton without it; None where NVIDIA's bulletin names one and this
            package does not know it.
    """

    name: str
    fixed: tuple[int, ...] | None


WEAKNESSES = (
    Weakness("CVE-2025-23310", (2, 59, 1)),
    Weakness("CVE-2025-23311", (2, 59, 1)),
    Weakness("CVE-2025-23319", (2, 59, 1)),
    Weakness("CVE-2025-23320", (2, 59, 1)),
    Weakness("CVE-2025-23334", (2, 59, 1)),
    Weakness("CVE-2025-33201", None),
    Weakness("CVE-2026-24206", None),
    Weakness("CVE-2026-24207", None),
    Weakness("CVE-2026-24208", None),
    Weakness("CVE-2026-24209", None),
)


def weaknesses_of(version: str) -> list[str]:
    """Names of the published weaknesses that a Triton has, or may have.

    Args:
        version: as Triton says it, such as 2.51.0.
    """
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return [one.name for one in WEAKNESSES if one.fixed is None or numbers < one.fixed]
