"""Client of a radapter-serve server: classifies, segments, searches and embeds over gRPC or HTTP, without torch."""

from ._async_client import AsyncClient
from ._client import Client
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
from ._results import Classification, Hit, Release, Segmentation

__all__ = [
    "AsyncClient",
    "Classification",
    "Client",
    "Hit",
    "ImageLike",
    "InvalidImage",
    "InvalidRequest",
    "InvalidURL",
    "ModelNotFound",
    "Profile",
    "RAdapterClientError",
    "Release",
    "Segmentation",
    "ServerError",
    "ServerUnavailable",
    "Timeout",
]
