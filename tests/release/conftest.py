"""Fixtures with a small release, which the rooms of serving share."""

from tests.helpers.served import client, local, repository, sealed, server

__all__ = ["client", "local", "repository", "sealed", "server"]
