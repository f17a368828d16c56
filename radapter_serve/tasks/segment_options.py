"""How an image is segmented: what a request may choose, and what it may not exceed."""

from __future__ import annotations

from dataclasses import dataclass

from radapter_serve.contract.errors import invalid

MAX_REFINE = 100


@dataclass(frozen=True)
class SegmentOptions:
    """How an image is segmented.

    Args:
        short_side: shorter side in pixels of the working image that windows go over, at least a
            window. None: 1.5 windows (336 for 224, as SCLIP has it), so that each pixel is seen in
            two or more contexts and objects that one view of the whole image shows too small get
            more patches.
        stride: pixels from one window to the next, from 1 to a window's size. None: half a window.
        refine: steps of pixel-adaptive refinement of the cosines, 0 for none; 10 is usual.
        threshold: probability in [0, 1] below which a pixel is background. None: only pixels that
            no proposal covers are; without proposals there is no background.
        proposal_weight: w in [0, 1] of the fusion p = p_proposal^(1-w) p_clip^w, for proposals that
            bring scores.

    Raises:
        TaskError: a value out of its range.
    """

    short_side: int | None = None
    stride: int | None = None
    refine: int = 0
    threshold: float | None = None
    proposal_weight: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (("short_side", self.short_side), ("stride", self.stride)):
            if value is not None and value < 1:
                raise invalid(f"{name} is {value}; a number of pixels, 1 or more")
        if not 0 <= self.refine <= MAX_REFINE:
            raise invalid(f"refine is {self.refine}; 0 (none) to {MAX_REFINE} steps, 10 is usual")
        for name, share in (
            ("threshold", self.threshold),
            ("proposal_weight", self.proposal_weight),
        ):
            if share is not None and not 0 <= share <= 1:
                raise invalid(f"{name} is {share}; allowed: 0 to 1")

    def sizes(self, window: int) -> tuple[int, int]:
        """`short_side` and `stride` in pixels, with their usual values where they are None.

        Args:
            window: pixels of a window.

        Raises:
            TaskError: a working image smaller than a window, or windows that leave pixels out.
        """
        short_side = window + window // 2 if self.short_side is None else self.short_side
        stride = max(1, window // 2) if self.stride is None else self.stride
        if short_side < window:
            raise invalid(f"short_side is {short_side}; at least {window}, the size of a window")
        if stride > window:
            raise invalid(f"stride is {stride}; 1 to {window}, the size of a window")
        return short_side, stride


USUAL = SegmentOptions()
