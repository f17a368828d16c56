"""The server that `radapter-query` asks, which is the client's."""

from tests.client.conftest import fake_repository, fake_server, protocol, url

__all__ = ["fake_repository", "fake_server", "protocol", "url"]
