"""A live server's release, without a server: how much a request brings at most."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from radapter_client import RAdapterClientError
from radapter_serve.encoders import served_release as live
from radapter_serve.errors import RAdapterError


@pytest.mark.parametrize(
    ("facts", "rows"), [({"max_batch_size": 4}, 4), ({"max_batch_size": 64}, 16), ({}, 16)]
)
def test_a_request_is_no_larger_than_the_servers_batch(
    facts: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Client:
        def __init__(self, url: str, **options: Any) -> None:
            made.append((url, options))

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def release(self) -> SimpleNamespace:
            return SimpleNamespace(version=3, facts=facts)

    monkeypatch.setattr(live, "Client", Client)
    _, release = live.connect("grpc://localhost:8001")
    assert release.version == 3
    assert made[-1] == ("grpc://localhost:8001", {"release": 3, "batch_size": rows})


def test_nobody_there() -> None:
    with pytest.raises(RAdapterError, match=r"grpc://127.0.0.1:9: no answer") as error:
        live.connect("grpc://127.0.0.1:9")
    assert not isinstance(error.value, RAdapterClientError)
