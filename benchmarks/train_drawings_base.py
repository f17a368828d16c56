"""Train the base of the benchmark of drawings from scratch: a small CLIP on pairs of drawing and name.

    python -m benchmarks.drawings.pairs --package package --out pairs       # once: draws the pairs
    python benchmarks/train_drawings_base.py --pairs pairs --out run        # trains until it is stopped; run it again to go on
    python benchmarks/train_drawings_base.py --pairs pairs --out final --start run/checkpoint.pt --decay 1000

The rate is level until it is stopped, so a run can end and go on on any day; `--decay` takes a copy of one down to zero,
which is the better model. What makes it learn much in a CPU second: common names, which many hands draw, come more often,
and every hand of a name equally often; two hands' drawings of a name are positives of one caption; only some patches of
an image are looked at, mostly those with ink; Muon trains the blocks; only the words that names use are trained.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import random
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from drawings.names import load_classes
from matplotlib import pyplot as plt
from safetensors.torch import save_file
from torch import Tensor, nn

from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.files import staged
from radapter_serve.signals import handled

SIZE, PATCH, MEAN, STD = 48, 8, (0.75, 0.75, 0.75), (0.35, 0.35, 0.35)
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": 192, "head_width": 64, "layers": 6},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
PREPROCESS: dict[str, Any] = {"size": SIZE, "mode": "RGB", "mean": MEAN, "std": STD}
PREPROCESS |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
TEMPLATES = ("{}", "a drawing of {}", "an icon of {}", "a picture of {}")
MOST_TOKENS = 16
ONE_WAY = frozenset("left right forward backward back next previous undo redo reply align east west".split())


class Pairs:
    """Drawings by name. Names that mean one class are one name.

    Attributes:
        pixels: uint8 [N, S, S, 4], premultiplied RGBA.
        black: bool [N], drawings without colours of their own.
        one_way: bool [N], drawings whose name a mirror makes wrong.
        by_name: name to its sets' drawings: {name: {set: rows}}, of the training part.
        words: the words of each row.
        validation: rows of classes in the sets that training does not see, by set.
        classes: label lines of the classes, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.pixels = torch.from_numpy(np.load(folder / "pixels.npy", mmap_mode="c"))
        self.class_of = load_classes()
        self.classes = sorted(set(self.class_of.values()))
        with (folder / "pairs.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self.words = [row["words"] for row in rows]
        self.by_name: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.validation: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            name = self.class_of.get(row["words"], row["words"])
            if row["split"] == "train":
                self.by_name[name][row["set"]].append(index)
            elif name in self.class_of:
                self.validation[row["set"]].append(index)
        self.synonyms: dict[str, list[str]] = defaultdict(list)
        for synonym, name in self.class_of.items():
            self.synonyms[name].append(synonym)
        self.one_way = torch.tensor([not ONE_WAY.isdisjoint(words.split()) for words in self.words])
        self.black = torch.from_numpy(np.array([row["black"] == "1" for row in rows]))

    def batch(self, names: list[str], draw: random.Random) -> tuple[Tensor, list[str]]:
        """Two drawings of each name, by two hands where there are, and a caption of each name."""
        chosen, captions = [], []
        for name in names:
            hands = list(self.by_name[name].values())
            two = draw.sample(hands, 2) if len(hands) > 1 else hands * 2
            chosen += [draw.choice(rows) for rows in two]
            words = self.words[chosen[-1]]
            if name in self.synonyms and draw.random() < 0.4:
                words = draw.choice(self.synonyms[name])
            captions.append(draw.choice(TEMPLATES).format(words))
        return torch.tensor(chosen), captions


class Words:
    """The tokenizer, cut down to the words that names and templates use, and remembering what it has seen.

    Attributes:
        used: token ids, sorted; the end token stays the largest.
    """

    def __init__(self, words: set[str]) -> None:
        self.tokenizer = open_clip.SimpleTokenizer()
        self.pieces: dict[str, list[int]] = {}
        for word in sorted({part for text in (*words, *TEMPLATES) for part in text.replace("{}", "").split()}):
            self.pieces[word] = self.tokenizer.encode(word)
        self.start, self.end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        self.used = sorted({self.start, self.end} | {token for pieces in self.pieces.values() for token in pieces})
        self.row_of = {token: row for row, token in enumerate(self.used)}

    def __call__(self, texts: list[str]) -> Tensor:
        """Rows of the used tokens, integer [N, L], padded with zeros."""
        lines = []
        for text in texts:
            inner = [token for word in text.split() for token in self.pieces[word]][: MOST_TOKENS - 2]
            lines.append([self.row_of[token] for token in (self.start, *inner, self.end)])
        tokens = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.long)
        for row, line in enumerate(lines):
            tokens[row, : len(line)] = torch.tensor(line)
        return tokens


class KeptPatches(nn.Module):
    """In the place of open_clip's patch dropout: keeps the patches that `index` [B, K] names, and the class token."""

    index: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] to [B, 1 + K, D]."""
        if not self.training or self.index is None:
            return x
        kept = x[:, 1:].gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], kept], dim=1)


def inked(pixels: Tensor, keep: int) -> Tensor:
    """Which patches of images [B, 3, S, S] to look at, [B, keep]: drawn at random, those with ink more often."""
    grey = pixels.mean(1, keepdim=True)
    spread = (F.avg_pool2d(grey**2, PATCH) - F.avg_pool2d(grey, PATCH) ** 2).clamp(min=0).sqrt().flatten(1)
    noise = -torch.log(-torch.log(torch.rand_like(spread).clamp(1e-6, 1 - 1e-6)))  # Gumbel
    return ((spread + 0.05).log() + noise).topk(keep, dim=1).indices


def augment(drawings: Tensor, black: Tensor, one_way: Tensor) -> Tensor:
    """Premultiplied RGBA, uint8 [B, S, S, 4], to pixels [B, 3, S, S]: turned, warped, thinned, outlined, recoloured."""
    x = drawings.permute(0, 3, 1, 2).float() / 255
    count, size = len(x), x.shape[-1]

    def some(share: float) -> Tensor:
        return torch.rand(count) < share

    angle, scale = torch.randn(count) * 0.12, torch.empty(count).uniform_(0.8, 1.25)
    flip = torch.where(some(0.5) & ~one_way, -1.0, 1.0)
    move = (torch.rand(2, count) - 0.5) * 0.25
    stretch = torch.empty(count).uniform_(0.88, 1.14)
    across = torch.stack([scale * stretch * angle.cos() * flip, -scale * angle.sin(), move[0]], dim=1)
    down = torch.stack([scale * angle.sin() * flip, scale / stretch * angle.cos(), move[1]], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), [count, 4, size, size], align_corners=False)
    warp = torch.randn(count, 2, 5, 5) * (0.07 * torch.rand(count, 1, 1, 1) * some(0.3)[:, None, None, None])
    grid = grid + F.interpolate(warp, size=(size, size), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, align_corners=False)

    alpha = x[:, 3:].clone()
    thicker, thinner, outlined = (some(share) & black for share in (0.12, 0.08, 0.08))
    alpha[thicker] = F.max_pool2d(alpha[thicker], 3, 1, 1)
    alpha[thinner] = 0.5 * (alpha[thinner] - F.max_pool2d(-alpha[thinner], 3, 1, 1))
    alpha[outlined] = F.max_pool2d(alpha[outlined], 3, 1, 1) + F.max_pool2d(-alpha[outlined], 3, 1, 1)

    paper, ink = torch.ones(count, 3), torch.zeros(count, 3)
    coloured_paper, coloured_ink, inverted = some(0.35), some(0.35), some(0.2)
    paper[coloured_paper] = 0.55 + 0.45 * torch.rand(int(coloured_paper.sum()), 3)
    ink[coloured_ink] = 0.6 * torch.rand(int(coloured_ink.sum()), 3) * torch.rand(int(coloured_ink.sum()), 1)
    swap = (inverted & black)[:, None]
    paper, ink = torch.where(swap, ink, paper), torch.where(swap, paper, ink)
    mix = torch.eye(3) + 0.15 * torch.randn(count, 3, 3) * some(0.6)[:, None, None]
    grey = some(0.2).float()[:, None, None]
    colours = torch.einsum("bij,bjhw->bihw", mix * (1 - grey) + grey / 3, x[:, :3])
    drawn = torch.where(black[:, None, None, None], ink[:, :, None, None] * alpha, colours)
    y = (drawn + paper[:, :, None, None] * (1 - torch.where(black[:, None, None, None], alpha, x[:, 3:]))).clamp(0, 1)

    for share, mode in ((0.08, "nearest"), (0.05, "bilinear")):  # pixel art, and out of focus
        coarse = some(share)
        small = F.interpolate(y[coarse], size=random.choice((16, 20, 24)), mode="area")
        y[coarse] = F.interpolate(small, size=size, mode=mode)
    return (y - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def on_paper(drawings: Tensor) -> Tensor:
    """Premultiplied RGBA, uint8 [B, S, S, 4], on white paper, to pixels [B, 3, S, S]."""
    x = drawings.permute(0, 3, 1, 2).float() / 255
    return (x[:, :3] + 1 - x[:, 3:] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss, images [C·E, D] being E drawings of each of the texts [C, D]."""
    count, each = len(texts), len(images) // len(texts)
    logits = scale * images @ texts.T
    own = torch.arange(count).repeat_interleave(each)
    to_texts = F.cross_entropy(logits, own)
    to_images = -logits.log_softmax(0)[torch.arange(len(images)), own].mean()
    return (to_texts + to_images) / 2


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) in float32, matrices of one shape together: torch's own computes in bfloat16, slow on CPUs."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the orthogonalised momentum, as large as AdamW's (0.2 · √max(a, b), Liu 2025)."""
        for group in self.param_groups:
            own = group["params"]
            gradient = torch.stack([p.grad for p in own])
            state = self.state[own[0]]
            kept = state.setdefault("momentum", torch.zeros_like(gradient))
            kept.lerp_(gradient, 1 - group["momentum"])
            x = gradient.lerp(kept, group["momentum"])
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton and Schulz's iteration, Jordan's coefficients
                square = x @ x.mT
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x.mT if tall else x
            size = 0.2 * math.sqrt(max(x.shape[1:]))
            for p, direction in zip(own, x, strict=True):
                p.mul_(1 - group["lr"] * group["decay"]).add_(direction, alpha=-group["lr"] * size)


class Training:
    """A model in training: its weights, their running average, its optimizers, and how far it is."""

    def __init__(self, pairs: Pairs, args: argparse.Namespace) -> None:
        self.pairs, self.args = pairs, args
        torch.manual_seed(args.seed)
        self.words = Words({*pairs.words, *pairs.class_of})
        self.model: Any = open_clip.CLIP(MODEL["embed_dim"], {**MODEL["vision_cfg"]}, MODEL["text_cfg"])
        self.model.visual.patch_dropout = KeptPatches()
        self.model.token_embedding = nn.Embedding(len(self.words.used), MODEL["text_cfg"]["width"])
        nn.init.normal_(self.model.token_embedding.weight, std=0.02)
        named = list(self.model.named_parameters())
        blocks = [p for name, p in named if "resblocks" in name and p.ndim == 2]
        rest = [p for name, p in named if not ("resblocks" in name and p.ndim == 2)]
        self.optimizers = [
            Muon(blocks, args.learning_rate),
            torch.optim.AdamW(rest, args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.average: Any = copy.deepcopy(self.model).eval()
        self.draw, self.numbers = random.Random(args.seed), np.random.default_rng(args.seed)
        self.names = sorted(pairs.by_name)
        weights = np.array([len(pairs.by_name[name]) for name in self.names]) ** args.common
        self.shares = weights / weights.sum()
        self.step, self.images, self.seconds, self.decayed = 0, 0, 0.0, 0

    def one_step(self, rate: float) -> float:
        """Train on one batch; returns its loss."""
        args, pairs, model = self.args, self.pairs, self.model
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
        picked = self.numbers.choice(len(self.names), args.names, replace=False, p=self.shares)
        rows, captions = pairs.batch([self.names[i] for i in picked], self.draw)
        pixels = augment(pairs.pixels[rows], pairs.black[rows], pairs.one_way[rows])
        model.visual.patch_dropout.index = inked(pixels, args.patches)
        loss = contrast(encode_image(model, pixels), encode_text(model, self.words(captions)), model.logit_scale.exp())
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step, self.images = self.step + 1, self.images + len(rows)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            weight = 1 - min(args.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.parameters()), list(model.parameters()), weight)
        return loss.item()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Zero-shot accuracy in % of the running average on the classes, by set that training does not see."""
        pairs, average = self.pairs, self.average
        lines = [[t.format(s) for s in pairs.synonyms[name] for t in TEMPLATES] for name in pairs.classes]
        texts = encode_text(average, self.words([text for line in lines for text in line]))
        heads = torch.stack([own.mean(0) for own in texts.split([len(line) for line in lines])])
        heads = F.normalize(heads, dim=-1)
        found = {}
        for name, rows in sorted(pairs.validation.items()):
            truth = torch.tensor([pairs.classes.index(pairs.class_of[pairs.words[row]]) for row in rows])
            images = torch.cat([encode_image(average, on_paper(pairs.pixels[part])) for part in torch.tensor(rows).split(128)])
            found[name] = round(100 * (images @ heads.T).argmax(1).eq(truth).float().mean().item(), 2)
        return {"mean": round(sum(found.values()) / len(found), 2), **found}

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on as this one would have."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": [torch.get_rng_state(), self.draw.getstate(), self.numbers.bit_generator.state, random.getstate()],
            "counts": [self.step, self.images, self.seconds, self.decayed],
            "used": self.words.used,
        }

    def load(self, path: Path, fresh_decay: bool) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=False)
        if state["used"] != self.words.used:
            raise SystemExit(f"{path} was trained on other names than --pairs has; name the same pairs")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        torch.set_rng_state(state["random"][0])
        self.draw.setstate(state["random"][1])
        self.numbers.bit_generator.state = state["random"][2]
        random.setstate(state["random"][3])
        self.step, self.images, self.seconds, self.decayed = state["counts"]
        self.decayed = 0 if fresh_decay else self.decayed


def train(args: argparse.Namespace) -> None:
    """Train until the steps are done or a signal comes; either way the checkpoint and the model are written."""
    torch.set_num_threads(args.threads)
    training, own = Training(Pairs(args.pairs), args), args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if own.is_file() or args.start:
        training.load(own if own.is_file() else args.start, fresh_decay=not own.is_file())
    names = len(training.names)
    print(f"{names} names, {len(training.words.used)} tokens, step {training.step}", flush=True)
    stopped: list[int] = []
    with handled(lambda number, _: stopped.append(number), signal.SIGTERM, signal.SIGINT):
        losses: list[float] = []
        saved = measured = began = time.monotonic()
        before = training.seconds
        while not stopped and training.step != args.steps and not (args.decay and training.decayed >= args.decay):
            rate = min((training.step + 1) / args.warmup, 1.0)
            if args.decay:
                rate *= 1 - training.decayed / args.decay
                training.decayed += 1
            losses.append(training.one_step(rate))
            now = time.monotonic()
            training.seconds = before + now - began
            last = bool(stopped) or training.step == args.steps or (args.decay and training.decayed >= args.decay)
            if now - measured > args.measure_every or last:
                record(training, losses, args.out)
                losses, measured = [], time.monotonic()
            if now - saved > args.save_every or last:
                with staged(own) as part:
                    torch.save(training.state(), part)
                save(training.average, training.words.used, args.out / "base")
                saved = time.monotonic()


def record(training: Training, losses: list[float], folder: Path) -> None:
    """A line of the curve, on screen and in `curve.jsonl`, and its picture."""
    loss = sum(losses) / len(losses)
    line = {"step": training.step, "images": training.images, "seconds": round(training.seconds), "loss": round(loss, 4)}
    line |= {"accuracy": training.validate()}
    print(json.dumps(line), flush=True)
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    lines = [json.loads(row) for row in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([row["images"] for row in lines], [row["loss"] for row in lines])
    left.set(xlabel="drawings trained on", ylabel="loss")
    for name in lines[-1]["accuracy"]:
        right.plot([row["images"] for row in lines], [row["accuracy"].get(name) for row in lines], label=name)
    right.set(xlabel="drawings trained on", ylabel="zero-shot top-1 on validation sets, %")
    right.legend()
    figure.savefig(folder / "curve.png", dpi=100)
    plt.close(figure)


def save(model: nn.Module, used: list[int], folder: Path) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="folder of benchmarks.drawings.pairs")
    add("--out", type=Path, required=True, help="checkpoint, curve and model; a checkpoint that is there is gone on from")
    add("--start", type=Path, help="checkpoint of another run to start from")
    add("--steps", type=int, default=-1, help="steps in all; none by default, it trains until SIGTERM")
    add("--decay", type=int, default=0, help="take the rate down to zero within this many steps, then end")
    add("--names", type=int, default=128, help="names, and captions, a step; each has two drawings")
    add("--common", type=float, default=1.5, help="a name is drawn in proportion to this power of the sets that have it")
    add("--patches", type=int, default=14, help="patches of an image that a step looks at, of 36")
    add("--learning-rate", type=float, default=2e-3, help="level rate of Muon and AdamW")
    add("--warmup", type=int, default=100, help="steps in which the rate rises")
    add("--average", type=float, default=0.998, help="momentum of the running average that is saved")
    add("--measure-every", type=float, default=180, help="seconds between points of the curve")
    add("--save-every", type=float, default=180, help="seconds between checkpoints")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="seeds the weights, captions and augmentation")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
