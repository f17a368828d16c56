"""α by depth and by tower: a constant of each adapted layer, which multiplies the α of a fold or of
a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from radapter_serve.errors import RAdapterError


@dataclass(frozen=True)
class AlphaSchedule:
    """The adapter of a layer counts α·λ, where λ is a constant of its tower and of its depth.

    Block ℓ of L has `depth + (1−depth)·(ℓ−1)/(L−1)`, so that early blocks stay closer to the base
    (LiNeS), times the constant of its tower.

    Args:
        depth: λ of a tower's first block, from 0 to 1; that of its last is 1.
        image: λ of the image tower, from 0 to 1.
        text: λ of the text tower, from 0 to 1.
    """

    depth: float = 1.0
    image: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise RAdapterError(
                    f"alpha-{name} is {value}; allowed: 0 to 1, where 1 leaves alpha as it is"
                )

    def __str__(self) -> str:
        return ", ".join(f"alpha-{name} {value:g}" for name, value in asdict(self).items())

    def factors(self, keys: Iterable[str]) -> dict[str, float]:
        """λ of each layer.

        Args:
            keys: state-dict keys of all adapted layers; the first number in a key is its block's.
        """
        blocks = {key: int(next(part for part in key.split(".") if part.isdigit())) for key in keys}
        last: dict[bool, int] = {}
        for key, block in blocks.items():
            image = key.startswith("visual.")
            last[image] = max(
                block, last.get(image, 1)
            )  # a tower of one block has the λ of its first
        found = {}
        for key, block in blocks.items():
            image = key.startswith("visual.")
            tower = self.image if image else self.text
            found[key] = tower * (self.depth + (1 - self.depth) * block / last[image])
        return found


EVEN = AlphaSchedule()  # the same α in every layer
