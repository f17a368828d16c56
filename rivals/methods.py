"""All systems of the paper's tables, by their names in commands."""

from __future__ import annotations

from rivals.adaptformer import AdaptFormer
from rivals.clip_svd import CLIPSVD
from rivals.clipood import CLIPood
from rivals.coop import CoCoOp, CoOp
from rivals.flyp import MASK_ADAPTED, FineTuneLikePretrain
from rivals.full import FullFineTuning, LinearProbe, ProbeThenFineTuning
from rivals.lora import LoRA
from rivals.maple import MaPLe
from rivals.mask_fill import MaskFill
from rivals.method import Method
from rivals.radapter import ZeroShot, r_adapter
from rivals.repadapter import RepAdapter
from rivals.soup import UniformSoup

METHODS: dict[str, Method] = {
    "zero-shot": ZeroShot(),
    "ft": FullFineTuning(),
    "lp": LinearProbe(),
    "lp-ft": ProbeThenFineTuning(),
    "wise-ft": FullFineTuning(alpha=0.5),
    "soup": UniformSoup(),
    "mask-fill": MaskFill(),
    "flyp": FineTuneLikePretrain(),
    "wise-flyp": FineTuneLikePretrain(alpha=0.5),
    "mask-adapted": MASK_ADAPTED,
    "coop": CoOp(),
    "cocoop": CoCoOp(),
    "maple": MaPLe(),
    "clipood": CLIPood(),
    "repadapter": RepAdapter(),
    # In texts only, with as many parameters as Table 2 prints.
    "repadapter-t": RepAdapter(towers=("text",), hidden=14),
    "adaptformer": AdaptFormer(),
    "lora": LoRA(),
    "clip-svd": CLIPSVD(),
    "r-adapter": r_adapter("imagenet"),
}
