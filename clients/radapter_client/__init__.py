"""Client of a radapter-serve server: classifies, segments, searches and embeds over gRPC or HTTP,
without torch.
"""

from ._async import AsyncClient
from ._client import Client
from ._images import ImageLike, list_images
from ._results import Classification, Hit, Hits, Receipt, Release, Segmentation
from ._wire import Reply, Request, Transport, Values
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
    "Receipt",
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
