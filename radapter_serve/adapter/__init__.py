"""R-Adapter: attach it to a CLIP, keep it in a file, fold it into plain CLIP weights.

The adapter is linear and directly follows a linear layer. With F = W_adp transposed, the adapter
`h(X) = X + alpha·X·W_adp` after the layer `W, b` equals the layer `W + alpha·F·W, b + alpha·F·b`.
"""

from radapter_serve.adapter.attach import Adapters, Form, Site, attach, attach_adapter, find_sites
from radapter_serve.adapter.file import (
    Adapter,
    Metadata,
    average_adapters,
    base_digest,
    fold,
    load_adapter,
    save_adapter,
)

__all__ = [
    "Adapter",
    "Adapters",
    "Form",
    "Metadata",
    "Site",
    "attach",
    "attach_adapter",
    "average_adapters",
    "base_digest",
    "find_sites",
    "fold",
    "load_adapter",
    "save_adapter",
]
