"""What α scales: the difference between a base and what was learned on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from radapter_serve.adapter import Adapter, Adapters, attach_adapter, fold
from radapter_serve.adapter.file import check_alpha
from radapter_serve.adapter.line import Line
from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError

ALPHA_IS_FOLDED = (
    "--alpha dynamic is for adapters: a checkpoint or a LoRA has other weights at each alpha, so"
    " give numbers, such as --alpha 0.5 1, each a release"
)


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

    @property
    def made_of(self) -> dict[str, Any] | None:
        """What a release says that it was made of; None for adapters."""

    def check(self, alpha: float) -> None:
        """Refuse an α that it does not have, before anything is written."""

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

    @property
    def made_of(self) -> None:
        return None

    def check(self, alpha: float) -> None:
        check_alpha(alpha)

    def fold(self, alpha: float) -> dict[str, Tensor]:
        return fold(self.weights, self.adapter, alpha)

    def beside(self) -> dict[str, Tensor]:
        return {**self.weights, **self.adapter.tensors}

    def reference(self, base: Base) -> Adapters:
        return attach_adapter(base.model, self.adapter, self.adapter.metadata.alpha)


@dataclass(frozen=True)
class LineChange:
    """A tuned checkpoint, or a merged LoRA, on the line from its base."""

    line: Line

    @property
    def digest(self) -> str:
        return self.line.digest

    @property
    def base_digest(self) -> str:
        return self.line.base_digest

    @property
    def made_of(self) -> dict[str, Any]:
        return self.line.made_of

    def check(self, alpha: float) -> None:
        self.line.check(alpha)

    def fold(self, alpha: float) -> dict[str, Tensor]:
        return self.line.at(alpha)

    def beside(self) -> dict[str, Tensor]:
        raise RAdapterError(ALPHA_IS_FOLDED)

    def reference(self, base: Base) -> _OnLine:
        return _OnLine(base, self.line)


class _OnLine:
    """A model whose weights are moved along a line, by torch's own interpolation."""

    def __init__(self, base: Base, line: Line) -> None:
        self._model = base.model
        self._line = line
        self._alpha = 0.0

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    @torch.no_grad()
    def alpha(self, value: float) -> None:
        start = self._line.tuned if self._line.base is None else self._line.base
        for name, tensor in self._model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start[name], self._line.tuned[name], value))
        self._alpha = value
