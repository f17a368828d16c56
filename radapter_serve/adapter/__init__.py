"""R-Adapter: attach it to a CLIP, keep it in a file, fold it into plain CLIP weights.

The adapter is linear and sits right after a linear layer, so with F = W_adp transposed `h(X) = X +
alpha·X·W_adp`, applied after the linear layer `W, b`, equals the layer `W + alpha·F·W, b +
alpha·F·b`.
"""

from radapter_serve.adapter.attach import Adapters, Form, attach, attach_adapter
from radapter_serve.adapter.file import Adapter, Metadata, base_digest, load_adapter, save_adapter
from radapter_serve.adapter.fold import fold
from radapter_serve.adapter.sites import Site, find_sites
from radapter_serve.adapter.soup import average_adapters

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
