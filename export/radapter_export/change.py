"""What α scales: the difference between a base and what was learned on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from radapter_serve.adapter import Adapter, Adapters, attach_adapter, fold
from radapter_serve.clip.base import Base


class Reference(Protocol):
    """A model with the change in it, which does not come from the folded weights.

    Attributes:
        alpha: the re-scaling in [0, 1] that the model has; setting it changes the model.
    """

    alpha: float


class Change(Protocol):
    """What α scales."""

    @property
    def digest(self) -> str:
        """Of what was learned."""

    @property
    def base_digest(self) -> str:
        """Of what the change starts from."""

    def fold(self, alpha: float) -> dict[str, Tensor]:
        """The weights at one α, by the base's names.

        Raises:
            RAdapterError: a value is not finite.
        """

    def beside(self) -> dict[str, Tensor]:
        """The weights of a model whose α is an input: the base's, and those that α scales."""

    def reference(self, base: Base) -> Reference:
        """Put the change into the base's model, which agreement is checked with."""


@dataclass(frozen=True)
class AdapterChange:
    """An adapter for its base.

    Attributes:
        adapter: of the base.
        weights: of the base.
    """

    adapter: Adapter
    weights: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        return self.adapter.digest

    @property
    def base_digest(self) -> str:
        return self.adapter.metadata.base_digest

    def fold(self, alpha: float) -> dict[str, Tensor]:
        return fold(self.weights, self.adapter, alpha)

    def beside(self) -> dict[str, Tensor]:
        return {**self.weights, **self.adapter.tensors}

    def reference(self, base: Base) -> Adapters:
        return attach_adapter(base.model, self.adapter, self.adapter.metadata.alpha)
