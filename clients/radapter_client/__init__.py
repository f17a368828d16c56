"""Client of a radapter-serve server: classifies and embeds images and texts over gRPC or HTTP, without torch."""

from ._client import AsyncClient, Client
from ._exceptions import (
    InvalidImage,
    InvalidRequest,
    InvalidURL,
    ModelNotFound,
    RAdapterClientError,
    ServerError,
    ServerUnavailable,
    Timeout,
)
from ._images import ImageLike
from ._profile import Profile
from ._results import Classification, Release

__all__ = [
    "AsyncClient",
    "Classification",
    "Client",
    "ImageLike",
    "InvalidImage",
    "InvalidRequest",
    "InvalidURL",
    "ModelNotFound",
    "Profile",
    "RAdapterClientError",
    "Release",
    "ServerError",
    "ServerUnavailable",
    "Timeout",
]
