"""Client of a radapter-serve server: classifies, segments, searches and embeds over gRPC or HTTP,
without torch.
"""

from ._arguments import ImageLike, list_images
from ._client import AsyncClient, Client
from ._results import Classification, Hit, Hits, Release, Segmentation
from ._wire import AsyncTransport, Reply, Request, Transport, Values
from .failures import (
    InvalidImage,
    InvalidRequest,
    InvalidURL,
    ModelNotFound,
    RAdapterClientError,
    ServerError,
    ServerUnavailable,
    Timeout,
    Unauthorized,
)

__all__ = [
    "AsyncClient",
    "AsyncTransport",
    "Classification",
    "Client",
    "Hit",
    "Hits",
    "ImageLike",
    "InvalidImage",
    "InvalidRequest",
    "InvalidURL",
    "ModelNotFound",
    "RAdapterClientError",
    "Release",
    "Reply",
    "Request",
    "Segmentation",
    "ServerError",
    "ServerUnavailable",
    "Timeout",
    "Transport",
    "Unauthorized",
    "Values",
    "list_images",
]
