"""Train the demo's base model from scratch: a small CLIP on emoji drawings in many styles.

    python benchmarks/train_demo_base.py --out base

What makes it work on so little data and two cores: several vendors' drawings of one concept are positives of the same
caption; half of the image's patches are dropped (FLIP, arXiv 2212.00794); Muon trains the blocks; only the part of the
vocabulary that captions use is trained, and every other word starts at zero, so that it says nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.demo.data import STYLES, Concept, concepts, drawing, render
from radapter_serve.files import staged

SIZE, MEAN, STD = 48, (0.75, 0.73, 0.7), (0.32, 0.32, 0.34)
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 192, "head_width": 32, "layers": 6},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
PREPROCESS: dict[str, Any] = {"size": SIZE, "mode": "RGB", "mean": MEAN, "std": STD}
PREPROCESS |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
CAPTION_TOKENS = 16
SEEN = ("train", "pretrain")  # splits of concepts that the base is trained on
KINDS = {"line": ("a line drawing", "a drawing"), "icon": ("a black icon", "an icon")}
KINDS["emojitwo-icon"] = KINDS["icon"]
OTHERS = ("a colour drawing", "a drawing", "a picture", "an emoji")


def caption(concept: Concept, style: str, class_share: float, draw: random.Random) -> tuple[str, bool]:
    """A caption of a drawing, and whether it says no more than the class: then it is true of the whole class."""
    kind = draw.choice(KINDS.get(style, OTHERS))
    if concept.class_name and draw.random() < class_share:
        alone = draw.random() < 0.4
        return f"{kind} of {concept.class_name if alone else f'{concept.name}, {concept.class_name}'}", alone
    if concept.tags and draw.random() < 0.5:
        return f"{kind} of {', '.join(draw.sample(concept.tags, min(len(concept.tags), draw.randint(1, 3))))}", False
    return f"{kind} of {concept.name}", False


def augment(drawings: Tensor) -> Tensor:
    """Premultiplied RGBA, uint8 [B, S, S, 4], to pixels [B, 3, S, S]: turned, scaled, flipped, recoloured, on paper."""
    x = drawings.permute(0, 3, 1, 2).float() / 255
    count, size = len(x), x.shape[-1]
    angle, scale = (torch.rand(count) - 0.5) * 0.7, torch.empty(count).uniform_(0.75, 1.15)
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    across = torch.stack([scale * angle.cos() * flip, -scale * angle.sin(), (torch.rand(count) - 0.5) * 0.3], dim=1)
    down = torch.stack([scale * angle.sin() * flip, scale * angle.cos(), (torch.rand(count) - 0.5) * 0.3], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), [count, 4, size, size], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    mix = torch.eye(3) + 0.12 * torch.randn(count, 3, 3) * (torch.rand(count, 1, 1) < 0.6)
    grey = (torch.rand(count, 1, 1) < 0.15).float()
    colours = torch.einsum("bij,bjhw->bihw", mix * (1 - grey) + grey / 3, x[:, :3])
    paper = torch.where(torch.rand(count, 1) < 0.5, 1.0, 0.6 + 0.4 * torch.rand(count, 3))[:, :, None, None]
    pixels: Tensor = normalize((colours + paper * (1 - x[:, 3:])).clamp(0, 1), list(MEAN), list(STD))
    return pixels


def contrast(images: Tensor, texts: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss with any number of positives: images [B, D], texts [C, D], positive bool [B, C]."""
    logits, share = scale * images @ texts.T, positive.float()
    to_texts = (share / share.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    to_images = (share / share.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return -(to_texts + to_images) / 2


class Drawings:
    """All drawings that the base may see, at its size, by concept."""

    def __init__(self) -> None:
        self.by_concept: dict[str, list[tuple[int, Concept, str]]] = defaultdict(list)
        pixels: list[Any] = []
        for concept in concepts():
            for style in STYLES if concept.split in SEEN else ():
                svg = drawing(concept, style)
                if svg is not None:
                    self.by_concept[concept.concept].append((len(pixels), concept, style))
                    pixels.append(np.asarray(render(svg, SIZE).convert("RGBa")))
        self.pixels = torch.from_numpy(np.stack(pixels))
        self.names = sorted(self.by_concept)

    def batch(self, count: int, each: int, class_share: float, draw: random.Random) -> tuple[Tensor, list[str], Tensor]:
        """`each` drawings [count·each, S, S, 4] and one caption of `count` concepts, and who is positive of whom."""
        chosen, captions, classes, alone = [], [], [], []
        for name in draw.sample(self.names, count):
            group = self.by_concept[name]
            shown = draw.sample(group, each) if len(group) >= each else draw.choices(group, k=each)
            chosen += [index for index, _, _ in shown]
            text, whole_class = caption(*shown[0][1:], class_share, draw)
            captions.append(text)
            classes.append(shown[0][1].class_name)
            alone.append(whole_class)
        same = torch.eye(count, dtype=torch.bool)
        for j in [j for j in range(count) if alone[j]]:
            same[:, j] |= torch.tensor([name == classes[j] for name in classes])
        return self.pixels[chosen], captions, same.repeat_interleave(each, dim=0)


def vocabulary() -> Tensor:
    """The token ids that captions can use, sorted; the end token stays the largest."""
    seen = [concept for concept in concepts() if concept.split in SEEN]
    words = {concept.name for concept in seen} | {tag for concept in seen for tag in concept.tags}
    words |= {concept.class_name for concept in seen} | {kind for kinds in (*KINDS.values(), OTHERS) for kind in kinds}
    tokens = open_clip.tokenize([f"a {word} of {word}, {word}" for word in sorted(words)])
    used: Tensor = torch.unique(tokens)
    return used


def train(args: argparse.Namespace) -> nn.Module:
    """Train, and return the running average of the weights, which is the better model."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    draw, data, used = random.Random(args.seed), Drawings(), vocabulary()
    vision = {**MODEL["vision_cfg"], "patch_dropout": args.patch_dropout}
    model: Any = open_clip.CLIP(MODEL["embed_dim"], vision, MODEL["text_cfg"])
    model.token_embedding = nn.Embedding(len(used), MODEL["text_cfg"]["width"])
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    row_of = torch.zeros(MODEL["text_cfg"]["vocab_size"], dtype=torch.long)
    row_of[used] = torch.arange(len(used))
    print(f"{len(data.names)} concepts, {len(data.pixels)} drawings, {len(used)} tokens", flush=True)

    blocks = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not ("resblocks" in name and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(blocks, args.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    average: nn.Module = copy.deepcopy(model).eval()
    started = time.perf_counter()
    for step in range(args.steps):
        rate = min((step + 1) / 100, 1.0, (args.steps - step) / (args.steps / 3))  # up, level, down in the last third
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
        drawings, captions, positive = data.batch(args.concepts, args.drawings, args.class_share, draw)
        tokens = row_of[open_clip.tokenize(captions, CAPTION_TOKENS)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            images, texts = encode_image(model, augment(drawings)), encode_text(model, tokens)
        loss = contrast(images, texts, positive, model.logit_scale.exp())
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            weight = 1 - min(args.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            left = (time.perf_counter() - started) / (step + 1) * (args.steps - step - 1)
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  {left / 60:.1f} min left", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(average, used, args.out)
    return average


def save(model: nn.Module, used: Tensor, folder: Path) -> None:
    """Write an open_clip folder: fp16 weights, the whole vocabulary, unused words at zero."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    state.pop("attn_mask", None)
    words = torch.zeros(MODEL["text_cfg"]["vocab_size"], MODEL["text_cfg"]["width"], dtype=torch.half)
    words[used] = state["token_embedding.weight"]
    state["token_embedding.weight"] = words
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with staged(folder / "open_clip_model.safetensors") as part:
        save_file(state, part)


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, prog="train_demo_base.py"
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("base"), help="folder of the model")
    add("--steps", type=int, default=3300, help="optimizer steps")
    add("--concepts", type=int, default=64, help="concepts, and captions, a step")
    add("--drawings", type=int, default=2, help="drawings of each concept a step")
    add("--learning-rate", type=float, default=2e-3, help="peak rate of Muon and AdamW")
    add("--class-share", type=float, default=0.5, help="share of captions that name the class")
    add("--patch-dropout", type=float, default=0.5, help="share of an image's patches that a step leaves out")
    add("--average", type=float, default=0.997, help="momentum of the running average that is saved")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast: for CPUs that have it")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="seeds the weights, captions and augmentation")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
