from tests.client.conftest import fake_repository, fake_server

__all__ = ["fake_repository", "fake_server"]
