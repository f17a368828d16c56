"""RepAdapter, AdaptFormer, LoRA and CLIP-SVD: what they add, fold and drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from rivals.adapters import (
    CLIPSVD,
    AdaptFormer,
    LinearBottleneck,
    LoRA,
    Parallel,
    RepAdapter,
    blocks_of,
    drop_path,
)
from rivals.method import Method, Run, System, learned

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
TEXTS = ["a photo of a green.", "a red."]
SLOW = pytest.mark.slow  # peft takes seconds to import


def started(method: Method, run: Run) -> System:
    """A system with all that learns drawn at random."""
    system = method.start(run)
    with torch.no_grad():
        for parameter in system.learning():
            parameter.normal_(std=0.2)
    return system.eval()


@torch.no_grad()
def embeds(system: System) -> Tensor:
    return torch.cat([system.embed_images(PIXELS), system.embed_texts(TEXTS)])


class Plain:
    """The base once more, in open_clip alone."""

    def __init__(self, name: str) -> None:
        self.model = open_clip.create_model(name).eval()
        self.weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.tokens = open_clip.get_tokenizer(name)(TEXTS)

    @torch.no_grad()
    def embeds(self, weights: Any = None) -> Tensor:
        """Embeddings of the images and texts with these weights, or with its own."""
        self.model.load_state_dict(self.weights if weights is None else weights)
        images = self.model.encode_image(PIXELS, normalize=True)
        return torch.cat([images, self.model.encode_text(self.tokens, normalize=True)])


@pytest.fixture(scope="module")
def plain(tiny_clip_dir: str) -> Plain:
    return Plain(tiny_clip_dir)


@pytest.mark.parametrize(
    "method",
    [RepAdapter(), AdaptFormer(), pytest.param(LoRA(), marks=SLOW), CLIPSVD()],
    ids=lambda method: type(method).__name__,
)
def test_starts_as_the_base_and_learns_beside_it(
    method: Method, make_run: Callable[..., Run], plain: Plain
):
    run = make_run()
    start = method.start(run.of(method.settings)).eval()
    torch.testing.assert_close(embeds(start), plain.embeds())
    changed = learned(method, run).end
    assert changed
    added = ("extra.", "lora_", ".values")
    assert all(any(part in name for part in added) for name in changed), changed


@pytest.mark.parametrize(
    "method",
    [
        RepAdapter(scale=0.5),
        RepAdapter(hidden=8, groups=4, towers=("text",)),
        pytest.param(LoRA(rank=3, scale=2), marks=SLOW),
        CLIPSVD(),
    ],
    ids=["repadapter", "repadapter of texts", "lora", "clip-svd"],
)
def test_folds_to_a_plain_clip_that_embeds_alike(
    method: Method, make_run: Callable[..., Run], plain: Plain
):
    system = started(method, make_run())
    before = {name: value.clone() for name, value in system.state_dict().items()}
    weights = system.clip()
    assert weights is not None
    torch.testing.assert_close(dict(system.state_dict()), before, rtol=0, atol=0)  # it can go on
    folded = plain.embeds(weights)
    torch.testing.assert_close(folded, embeds(system), rtol=0, atol=1e-5)
    assert (folded - plain.embeds()).abs().max() > 1e-2
    kinds = set()
    for name, value in plain.weights.items():
        if not torch.equal(value, weights[name]):
            kinds.add(".".join(name.split(".")[-2:]))
    further: dict[type[Method], set[str]] = {
        RepAdapter: {"attn.in_proj_bias", "c_fc.weight", "c_fc.bias"},
        CLIPSVD: {"out_proj.weight", "c_fc.weight", "c_proj.weight"},
    }
    assert kinds == {"attn.in_proj_weight"} | further.get(type(method), set())


def test_singular_values_by_their_equation(make_run: Callable[..., Run], plain: Plain):
    system = started(CLIPSVD(), make_run())
    weights = system.clip()
    base = plain.weights
    assert weights is not None
    block = "visual.transformer.resblocks.1."
    attention = f"{block}attn.in_proj_weight"  # three matrices
    mlp = f"{block}mlp.c_fc.weight"
    state = system.state_dict()
    spectra = state[f"model.{block}attn.parametrizations.in_proj_weight.0.values"]
    layers = [*zip(base[attention].chunk(3), weights[attention].chunk(3), spectra, strict=True)]
    [values] = state[f"model.{block}mlp.c_fc.parametrizations.weight.0.values"]
    for before, after, spectrum in [*layers, (base[mlp], weights[mlp], values)]:
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        torch.testing.assert_close(after, left @ spectrum.diag() @ right, rtol=0, atol=1e-5)


def test_grouped_bottleneck_by_its_equation():
    torch.manual_seed(0)
    adapter: Any = LinearBottleneck(6, hidden=4, groups=2, scale=0.5, dropout=0.0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6)
    inner = x @ adapter.down.weight.T + adapter.down.bias
    up = adapter.up.weight[:, :, 0]  # 3 outputs of each group see 2 of the bottleneck
    change = (
        torch.cat([inner[..., :2] @ up[:3].T, inner[..., 2:] @ up[3:].T], dim=-1) + adapter.up.bias
    )
    torch.testing.assert_close(adapter(x), x + 0.5 * change)


@pytest.mark.slow
def test_lora_is_counted_once(make_run: Callable[..., Run], plain: Plain):
    system = started(LoRA(rank=2, scale=1), make_run())
    weights = system.clip()
    base = plain.weights
    assert weights is not None
    for tower in ("visual.", ""):
        name = f"{tower}transformer.resblocks.1.attn"
        state = system.state_dict()
        a, b = (state[f"model.{name}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close(
            weights[f"{name}.in_proj_weight"], base[f"{name}.in_proj_weight"] + 0.5**0.5 * b @ a
        )
        torch.testing.assert_close(
            weights[f"{name}.out_proj.weight"], base[f"{name}.out_proj.weight"]
        )


def test_adaptformer_stands_beside_the_feed_forward_layer(
    make_run: Callable[..., Run], plain: Plain
):
    system = started(AdaptFormer(towers=("image",), scale=0.3), make_run())
    assert system.clip() is None
    plain.embeds()
    visual: Any = plain.model.visual
    extra: Any = system.extra
    with torch.no_grad():
        x = visual._embeds(PIXELS)
        for block, adapter in zip(visual.transformer.resblocks, extra, strict=True):
            assert isinstance(adapter, Parallel)
            x = x + block.attention(block.ln_1(x))
            inner = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
            x = x + block.mlp(block.ln_2(x)) + 0.3 * (inner @ adapter.up.weight.T + adapter.up.bias)
        expected = visual.ln_post(x[:, 0]) @ visual.proj
        embeds = system.model.encode_image(PIXELS)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [RepAdapter, AdaptFormer])
def test_drops_while_it_learns_and_only_then(kind: Any, make_run: Callable[..., Run]):
    run = make_run()
    batch = {"pixels": PIXELS, "labels": torch.tensor([0, 1, 2]), "texts": ["a", "b", "c"]}
    with torch.no_grad():
        for rates, learns in (((0.5, 0.0), True), ((0.0, 0.5), True), ((0.0, 0.0), False)):
            system = started(kind(dropout=rates[0], drop_path=rates[1]), run.of({}))
            assert (len({float(system(batch)) for _ in range(4)}) > 1) == learns
            torch.testing.assert_close(embeds(system), embeds(system), rtol=0, atol=0)


def test_drop_path_drops_whole_branches_of_an_input_more_often_the_deeper(
    make_run: Callable[..., Run],
):
    model = make_run().base.model
    layers = drop_path(model, ["image"], 0.5)
    assert [layer.p for layer in layers] == [0.0, 0.5]
    last = blocks_of(model, "image")[1]
    x = torch.randn(400, 5, 64)
    with torch.no_grad():
        attended = last.attention(last.ln_1(x))
        torch.manual_seed(0)
        branch = last.ls_1(attended)
    kept = branch.abs().sum(dim=(1, 2)) > 0
    assert 0.35 < kept.float().mean() < 0.65
    torch.testing.assert_close(branch[kept], 2 * attended[kept])
    for layer in layers:
        layer.eval()
    torch.testing.assert_close(last.ls_1(attended), attended, rtol=0, atol=0)
