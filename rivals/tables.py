"""All systems by their names in commands, the rows of the paper's tables, and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from radapter_serve.evaluation.rows import by_shift, metric_name, own_metric
from rivals.adapters import CLIPSVD, AdaptFormer, LoRA, RepAdapter
from rivals.cells import Judged
from rivals.flyp import MASK_ADAPTED, CLIPood, FineTuneLikePretrain
from rivals.full import FullFineTuning, LinearProbe, MaskFill, ProbeThenFineTuning, UniformSoup
from rivals.method import Method, with_rate
from rivals.prompts import CoCoOp, CoOp, MaPLe
from rivals.radapter import Variant, ZeroShot, r_adapter
from rivals.statistics import Images

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
    # In texts only, with the number of parameters that Table 2 prints.
    "repadapter-t": RepAdapter(towers=("text",), hidden=14),
    "adaptformer": AdaptFormer(),
    "lora": LoRA(),
    "clip-svd": CLIPSVD(),
    "r-adapter": r_adapter("imagenet"),
}

PRESERVE: dict[str, Any] = {"preserve": 10.0, "drop": 0.0}
ALL_CLASSES = 1000  # at least as many as any benchmark has
# The demo's base was trained on texts without full stops. Its features are longer than those of
# OpenAI's CLIP, so that a squared distance between features, as in Mask-Fill, has more weight.
NO_STOP: dict[str, Method] = {
    "CoOp, no full stop": CoOp(words="{}"),
    "CoCoOp, no full stop": CoCoOp(words="a photo of a {}"),
    "MaPLe, no full stop": MaPLe(words="a photo of a {}"),
}
# Rivals at the rates chosen with validation data of drawings or, if a name has a rate, of the set
# of the comment beside it; a rate stands in a table of that set alone.
AT_CHOSEN_RATE = {
    "WiSE-FLYP": with_rate(METHODS["wise-flyp"], 1e-3),
    "FLYP, 3e-4": with_rate(METHODS["flyp"], 3e-4),  # PACS
    "LoRA": with_rate(METHODS["lora"], 6e-4),
    "LoRA, 0.019": with_rate(METHODS["lora"], 0.019),  # PACS
    "CLIP-SVD": with_rate(METHODS["clip-svd"], 3e-3),
    "full fine-tuning": with_rate(METHODS["ft"], 2.7e-4),
    "full fine-tuning, 9e-4": with_rate(METHODS["ft"], 9e-4),  # PACS
    "WiSE-FT": with_rate(METHODS["wise-ft"], 2.7e-4),
    "WiSE-FT, 9e-4": with_rate(METHODS["wise-ft"], 9e-4),  # PACS
    "Mask-Fill": with_rate(MaskFill(weight=0.75), 9e-4),
    "Mask-Fill, 3e-3": with_rate(MaskFill(weight=0.75), 3e-3),  # PACS
    "CoOp, 0.02": with_rate(NO_STOP["CoOp, no full stop"], 0.02),  # drawings
    "CoOp, 0.2": with_rate(NO_STOP["CoOp, no full stop"], 0.2),  # PACS
    "CoCoOp, 0.63": with_rate(NO_STOP["CoCoOp, no full stop"], 0.63),  # PACS
    "MaPLe, 0.0035": NO_STOP["MaPLe, no full stop"],  # drawings
    "MaPLe, 0.35": with_rate(NO_STOP["MaPLe, no full stop"], 0.35),  # PACS
    "CLIPood, 1.5e-4": with_rate(METHODS["clipood"], 1.5e-4),  # drawings
    "CLIPood, 5e-4": with_rate(METHODS["clipood"], 5e-4),  # PACS
}


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    rows: Mapping[str, Method]  # methods by their names in the paper
    # Fields of a recipe that the benchmark may override.
    fields: Mapping[str, Any] = field(default_factory=dict)
    curves: bool = False  # show every α, as in Fig. 3
    # By row: the same method with other settings, chosen together with the rate.
    others: Mapping[str, Sequence[Method]] = field(default_factory=dict)
    # By row: factor of the paper's rate at which the grid of rates starts.
    starts: Mapping[str, float] = field(default_factory=dict)
    # Rows at their own rate and α, of which nothing is chosen.
    fixed: Sequence[str] = ()
    # By row: the row before it whose chosen rate it takes; its settings and α are chosen, or fixed.
    rate_of: Mapping[str, str] = field(default_factory=dict)


def by_task(recipe: str, alpha: float) -> dict[str, Method]:
    """List R-Adapter for retrieval or segmentation, unchanged and with one part changed each."""
    rows: dict[str, dict[str, Any]] = {
        "R-Adapter": {},
        "R-Adapter, no dropping": {"drop": 0.0},
        "R-Adapter, dropping per token": {"drop": 0.0, "variant": Variant(token_drop=0.2)},
        "R-Adapter, δ = 0": {"delta": 0.0},
        "R-Adapter, rank 4": {"rank": 4},
        "R-Adapter, preserve": {"drop": 0.0, "preserve": 10.0},
    }
    return {name: r_adapter(recipe, alpha, **changes) for name, changes in rows.items()}


def ablations() -> dict[str, Method]:
    """List the rows of Table 5, named by their parts of the method.

    The paper does not give its rates of dropout and drop-path, here 0.2, nor the optimizers and
    rates of B1 and B2, here those of their papers.
    """
    plain: dict[str, Any] = {
        "drop": 0.0,
        "momentum": 0.0,
        "positives": "single",
        "delta": 0.0,
        "epsilon": 0.0,
    }
    dropping = {"drop": 0.2}
    average = {"momentum": None}
    several = {"positives": "several", "delta": 0.05}
    smooth = {"epsilon": 0.02}
    rows: dict[str, tuple[float | None, dict[str, Any]]] = {
        "E0: none": (None, {}),
        "E1: DO": (None, {"variant": Variant(dropout=0.2)}),
        "E2: DP": (None, {"variant": Variant(drop_path=0.2)}),
        "E3: AD": (None, dropping),
        "E4: AC": (None, average),
        "E5: RS": (0.5, {}),
        "E6: AD, AC": (None, dropping | average),
        "E7: AD, AC, RS": (0.5, dropping | average),
        "E8: AD, AC, RS, LS": (0.5, dropping | average | smooth),
        "E9: AD, AC, RS, MPM": (0.5, dropping | average | several),
        "E10: AD, AC, RS, MPM, LS": (0.5, dropping | average | several | smooth),
    }
    others: dict[str, Method] = {
        "B1: AdaptFormer, DO": AdaptFormer(loss="infonce", dropout=0.2),
        "B2: RepAdapter, DO, DP": RepAdapter(loss="infonce", dropout=0.2, drop_path=0.2),
    }
    return others | {
        name: r_adapter("imagenet", alpha, **(plain | changes))
        for name, (alpha, changes) in rows.items()
    }


TABLES = {
    # The grids of the rivals start above their papers' rates, which are meant for runs of some
    # 25,000 steps.
    "main": Table(
        "The leading methods: rate, settings and α chosen with validation data",
        {
            "Zero-shot": METHODS["zero-shot"],
            "FT": METHODS["ft"],
            "FT, 9e-5": with_rate(METHODS["ft"], 9e-5),
            "WiSE-FT": METHODS["wise-ft"],
            "Uniform soup": METHODS["soup"],
            "WiSE-FLYP": METHODS["wise-flyp"],
            "WiSE-FLYP, α = 0.5": METHODS["wise-flyp"],
            "WiSE-FLYP, all classes": FineTuneLikePretrain(
                {**METHODS["wise-flyp"].settings, "negative_classes": ALL_CLASSES}, alpha=0.5
            ),
            "LoRA": METHODS["lora"],
            "LoRA, rank and α": LoRA(alpha=1.0),
            "Mask-Fill": METHODS["mask-fill"],
            # The weight chosen with both validation sets.
            "Mask-Fill, α": MaskFill(alpha=1.0, weight=0.75),
            "CLIPood": CLIPood(beta=0.5),  # by its paper for domain shifts
            "R-Adapter": METHODS["r-adapter"],
            "R-Adapter, the paper's rate and α": METHODS["r-adapter"],
            "R-Adapter, preserve": r_adapter("imagenet", **PRESERVE),
            "R-Adapter, preserve, all classes": r_adapter(
                "imagenet", negative_classes=ALL_CLASSES, **PRESERVE
            ),
            "R-Adapter, small": r_adapter("small", val_fraction=0.0),
        },
        others={
            "LoRA, rank and α": [LoRA(alpha=1.0, rank=rank) for rank in (1, 4, 16)],
            "Mask-Fill": [MaskFill(weight=0.75)],
        },
        starts={
            "FT": 3,
            "WiSE-FT": 3,
            "Uniform soup": 3,
            "WiSE-FLYP": 10,
            "LoRA": 3,
            "Mask-Fill": 10,
            "CLIPood": 10,
        },
        fixed=(
            "FT, 9e-5",
            "WiSE-FLYP, α = 0.5",
            "R-Adapter, the paper's rate and α",
            "R-Adapter, small",
        ),
        rate_of={
            "WiSE-FLYP, α = 0.5": "WiSE-FLYP",
            "WiSE-FLYP, all classes": "WiSE-FLYP",
            "LoRA, rank and α": "LoRA",
            "Mask-Fill, α": "Mask-Fill",
        },
    ),
    "1": Table(
        "Table 1: fine-tuned on all images, and judged on shifts too",
        {
            "Zero-shot": METHODS["zero-shot"],
            "FT": METHODS["ft"],
            "LP-FT": METHODS["lp-ft"],
            "WiSE-FT": METHODS["wise-ft"],
            "FLYP": METHODS["flyp"],
            "WiSE-FLYP": METHODS["wise-flyp"],
            "Uniform Soup": METHODS["soup"],
            "Mask-Fill": METHODS["mask-fill"],
            "R-Adapter": METHODS["r-adapter"],
        },
    ),
    "2": Table(
        "Table 2: fine-tuned on 16 images a class, and judged on shifts too",
        {
            "Zero-shot": METHODS["zero-shot"],
            "CoOp": METHODS["coop"],
            "CoCoOp": METHODS["cocoop"],
            "RepAdapter-T": METHODS["repadapter-t"],
            "CLIPood": METHODS["clipood"],
            **{f"R-Adapter, rank {rank}": r_adapter("few-shot", rank=rank) for rank in (1, 4, 8)},
            "R-Adapter, full rank": r_adapter("few-shot", rank=None),
        },
        {"shots": 16},
    ),
    "3": Table(
        "Table 3: retrieval between images and texts",
        {
            "Zero-shot": METHODS["zero-shot"],
            "FLYP": METHODS["flyp"],
            "WiSE-FLYP": METHODS["wise-flyp"],
            "LoRA": LoRA(loss="infonce", alpha=1.0),
            **by_task("retrieval", 0.8),
        },
        {"task": "retrieval"},
    ),
    "4": Table(
        "Table 4: segmentation",
        {
            "Zero-shot": METHODS["zero-shot"],
            "Mask-adapted CLIP (OVSeg)": replace(MASK_ADAPTED, alpha=1.0),
            **by_task("segmentation", 0.4),
        },
        {"task": "segmentation"},
    ),
    "5": Table("Table 5: ablations", ablations()),
    "why": Table(
        "One setting changed: no full stop after the class, and a weight for longer features",
        {**NO_STOP, "Mask-Fill, weight 0.75": MaskFill(weight=0.75)},
    ),
    "fig3": Table(
        "Fig. 3: from zero-shot, α = 0, to fine-tuned, α = 1",
        {"R-Adapter": METHODS["r-adapter"], "WiSE-FT": METHODS["wise-ft"]},
        curves=True,
    ),
    "all": Table(
        "Every system",
        {
            **{
                name: method
                for name, method in METHODS.items()
                if name not in ("lp", "mask-adapted", "r-adapter")
            },
            # By its paper for domain shifts; Table 2 uses the β for 16 images a class.
            "clipood": CLIPood(beta=0.5),
            **{f"r-adapter, rank {rank}": r_adapter("imagenet", rank=rank) for rank in (1, 4, 8)},
            "r-adapter": METHODS["r-adapter"],
        },
    ),
}


def images_of(rows: Sequence[Judged]) -> dict[str, Images]:
    """Collect each image's part of the figures, by column, from one row of each set at one α.

    Columns of cells without these parts are left out; a mean column has the images of each set.
    Cells of retrieval have the parts of one recall alone.
    """
    images: dict[str, Images] = {}
    for row in rows:
        values = row.per_image
        if values is not None:
            images[_column(row, row.metric)] = [values]
    _, shifted = by_shift({row.dataset: row for row in rows})
    if len(shifted) > 1 and all(name in images for name in shifted):
        images[f"mean of {len(shifted)} shifts"] = [images[name][0] for name in shifted]
    return images


def figures(rows: Sequence[Judged]) -> dict[str, float]:
    """Compute the figures of a table's row in %, by column, from one row of each set at one α.

    Sets in distribution come first, then the mean of several shifted sets, then each of them.
    Retrieval has a column for each recall.
    """
    values: dict[str, float] = {}
    by_name = {row.dataset: row for row in rows}
    ids, shifted = by_shift(by_name)
    for name in (*ids, *shifted):
        row = by_name[name]
        retrieval = row.task == "zeroshot_retrieval"
        if name == (shifted or [""])[0] and len(shifted) > 1 and not retrieval:
            head = f"mean of {len(shifted)} shifts"
            values[head] = mean(own_metric(by_name[other]) for other in shifted)
        for metric in row.metrics if retrieval else [row.metric]:
            values[_column(row, metric)] = 100 * row.metrics[metric]
    return values


def _column(row: Judged, metric: str) -> str:
    """Name the column of a row's metric; only retrieval has several for a set."""
    several = row.task == "zeroshot_retrieval" and len(row.metrics) > 1
    return f"{row.dataset}, {metric_name(metric)}" if several else row.dataset
