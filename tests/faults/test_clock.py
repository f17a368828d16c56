"""A clock that jumps, as it does when a machine wakes up or its time is set."""

from __future__ import annotations

import re

from tests.test_house import sources


def test_no_wait_reads_the_time_of_day() -> None:
    """The beginning of a span alone does."""
    modules = {**sources("radapter_serve"), **sources("clients/radapter_client")}
    del modules["radapter_serve.encoders.encoder"]
    for name, path in modules.items():
        assert not re.search(r"\btime\.time(_ns)?\(", path.read_text(encoding="utf-8")), name
