"""CoOp, CoCoOp and MaPLe: which vectors stand where, what learns, and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.errors import RAdapterError
from rivals.method import Run, learned
from rivals.prompts import CoCoOp, Conditional, CoOp, Coupled, MaPLe, Prompted

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class ByHand:
    """The tiny CLIP once more, its towers written out: prompts may be put before any block."""

    def __init__(self, name: str) -> None:
        self.model = open_clip.create_model(name).eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(name)

    def text(self, words: str, contexts: list[Tensor]) -> Tensor:
        """Embed placeholders and a class; contexts[j] replaces the former before block j."""
        model = self.model
        tokens = self.tokenize([words])
        x = model.token_embedding(tokens)
        for number, block in enumerate(model.transformer.resblocks):
            if number < len(contexts):
                x[:, 1 : 1 + len(contexts[number])] = contexts[number]
            x = block(
                x + model.positional_embedding if number == 0 else x, attn_mask=model.attn_mask
            )
        end = model.ln_final(x)[0, tokens[0].argmax()] @ model.text_projection
        return F.normalize(end, dim=-1)

    def image(self, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
        """Images whose patches are followed by prompts[j] before block j."""
        visual = self.model.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = (
            torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
            + visual.positional_embedding
        )
        patches = x.shape[1]
        for number, block in enumerate(visual.transformer.resblocks):
            if number < len(prompts):
                x = torch.cat([x[:, :patches], prompts[number].expand(len(x), -1, -1)], dim=1)
            x = block(visual.ln_pre(x) if number == 0 else x)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


@pytest.fixture(scope="module")
def by_hand(tiny_clip_dir: str) -> ByHand:
    return ByHand(tiny_clip_dir)


def test_coop_learns_a_context_for_all_classes_and_nothing_else(
    make_run: Callable[..., Run], by_hand: ByHand
):
    run = make_run()
    coop = learned(CoOp(), run)
    assert set(coop.end) == {"context.vectors"}
    system = coop.system
    assert isinstance(system, Prompted)
    vectors = system.context.vectors.detach()
    assert vectors.shape == (16, 64)
    words = " ".join(["X"] * 16)
    names = ["blue", "green", "red", "red one"]
    classes = torch.stack([by_hand.text(f"{words} {name}.", [vectors]) for name in names])
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        embeds = system.embed_classes(names, ["whatever {}"])
        logits = system.scores(PIXELS)
        loss = system({"pixels": PIXELS, "labels": labels, "texts": ["", "", ""]})
    torch.testing.assert_close(embeds, classes, rtol=0, atol=1e-5)
    scores = by_hand.model.logit_scale.exp() * by_hand.image(PIXELS, []) @ classes[:3].T
    torch.testing.assert_close(logits, scores, rtol=0, atol=1e-3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "words, text",
    [
        ("a photo of a", "a photo of a green."),
        ("a drawing of {}", "a drawing of green"),
        ("a drawing {} !", "a drawing green !"),
    ],
)
def test_context_that_starts_as_words_is_zero_shot_with_them(
    words: str, text: str, make_run: Callable[..., Run], by_hand: ByHand
):
    system = CoOp(length=2, words=words).start(make_run())
    with torch.no_grad():
        embeds = system.embed_classes(["green"], ["whatever {}"])
    torch.testing.assert_close(embeds[0], by_hand.text(text, []), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length, words", [(5, "a photo of a"), (3, "a photo {}"), (75, None)])
def test_contexts_that_do_not_fit_are_refused(length, words, make_run: Callable[..., Run]):
    with pytest.raises(RAdapterError):
        CoOp(length=length, words=words).start(make_run())


def test_cocoop_shifts_the_context_for_each_image(
    make_run: Callable[..., Run], by_hand: ByHand
) -> None:
    cocoop = learned(CoCoOp(), make_run())
    layers = {f"net.{number}.{name}" for number in (0, 2) for name in ("weight", "bias")}
    assert set(cocoop.end) == {"context.vectors", *layers}
    system = cocoop.system
    assert isinstance(system, Conditional)
    images = by_hand.image(PIXELS, [])
    weights = dict(system.net.named_parameters())
    hidden = (images @ weights["0.weight"].T + weights["0.bias"]).relu()
    shifts = (hidden @ weights["2.weight"].T + weights["2.bias"]).detach()
    assert (shifts[0] - shifts[1]).abs().max() > 1e-4
    vectors = system.context.vectors.detach()

    def cosines(names: list[str]) -> Tensor:
        rows = []
        for image, shift in zip(images, shifts, strict=True):
            texts = [by_hand.text(f"a photo of a {name}.", [vectors + shift]) for name in names]
            rows.append(torch.stack(texts) @ image)
        return torch.stack(rows)

    with torch.no_grad():
        logits = system.scores(PIXELS)
        others = system.embed_classes(["red one", "green"], ["whatever {}"])
        scores = system.embed_images(PIXELS) @ others.T
    expected = by_hand.model.logit_scale.exp() * cosines(["blue", "green", "red"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(scores, cosines(["red one", "green"]), rtol=0, atol=1e-5)
    with pytest.raises(RAdapterError, match="before the images"):
        system.embed_classes(["blue", "green"], ["whatever {}"])


@pytest.mark.parametrize("depth", [1, 9])
def test_maple_couples_prompts_of_both_towers(
    depth: int, make_run: Callable[..., Run], by_hand: ByHand
):
    run = make_run()
    method = MaPLe(depth=depth)
    depth = min(depth, 2)  # no deeper than the towers
    names = {"context.vectors", *(f"deep.{j}" for j in range(depth - 1))}
    names |= {f"couple.{j}.{name}" for j in range(depth) for name in ("weight", "bias")}
    maple = learned(method, run)
    assert set(maple.end) == names
    system = maple.system
    assert isinstance(system, Coupled)
    texts = [system.context.vectors, *system.deep]
    assert [tuple(prompts.shape) for prompts in texts] == [(2, 64)] * depth
    prompts = [
        text @ couple.weight.T + couple.bias
        for text, couple in zip(texts, system.couple, strict=True)
    ]
    with torch.no_grad():
        embeds = system.embed_classes(["green"], ["whatever {}"])
        torch.testing.assert_close(
            embeds[0], by_hand.text("a photo of a green.", texts), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            system.embed_images(PIXELS), by_hand.image(PIXELS, prompts), rtol=0, atol=1e-5
        )
        assert (system.embed_images(PIXELS) - by_hand.image(PIXELS, [])).abs().max() > 1e-3
