"""Train the base of the benchmark of drawings from scratch: a small CLIP on pairs of drawing and
name.

    python -m benchmarks.drawings.pairs --package package --out pairs   # once: draws the pairs
    python benchmarks/train_drawings_base.py --pairs pairs --out run    # trains until it is
    stopped; again: goes on python benchmarks/train_drawings_base.py --pairs pairs --out final
    --start run/checkpoint.pt \\ --decay 800 --average 0.99 --patches 36

The rate is level until a run is stopped, so it can go on any day; `--decay` takes a copy of it down
to zero, looking at all patches at last (FLIP, arXiv 2212.00794), and that is the model to use.

What makes it learn much in a CPU second: half of a step's names are classes, of the others those
that many hands draw come more often, and each hand of a name equally often; two hands' drawings of
a name are positives of one caption; only some patches of an image are looked at, those with ink
more often; Muon trains the blocks; only the words that names use are trained; products are computed
in bfloat16, which on a CPU with avx512_bf16 makes a step 2.7 times as fast.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.drawings.augment import MEAN, PATCH, SIZE, STD, augment, inked, on_paper
from benchmarks.drawings.batches import TEMPLATES, Pairs, Words
from benchmarks.drawings.learning import KeptPatches, Muon, contrast
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.contract.labels import split_label
from radapter_serve.files import staged
from radapter_serve.signals import handled

MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": PATCH,
        "width": 192,
        "head_width": 64,
        "layers": 6,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
MOST_HANDS = 20  # sets of a name, beyond which it does not come more often
PREPROCESS: dict[str, Any] = {"size": SIZE, "mode": "RGB", "mean": MEAN, "std": STD}
PREPROCESS |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


class Pool:
    """Names to draw from, in proportion to a power of the sets that have them, up to MOST_HANDS."""

    def __init__(self, pairs: Pairs, names: Collection[str], power: float) -> None:
        self.names = sorted(names)
        weights = (
            np.array([min(len(pairs.by_name[name]), MOST_HANDS) for name in self.names]) ** power
        )
        self.shares = weights / weights.sum()

    def draw(self, count: int, numbers: np.random.Generator) -> list[str]:
        """Different names; all of them, if there are fewer."""
        count = min(count, len(self.names))
        return [
            self.names[i]
            for i in numbers.choice(len(self.names), count, replace=False, p=self.shares)
        ]


class Training:
    """A model in training: its weights, their running average, its optimizers, and how far it
    is.
    """

    def __init__(self, pairs: Pairs, args: argparse.Namespace) -> None:
        self.pairs = pairs
        self.args = args
        torch.manual_seed(args.seed)
        self.words = Words({*pairs.words, *pairs.meaning})
        self.model: Any = open_clip.CLIP(
            MODEL["embed_dim"], {**MODEL["vision_cfg"]}, MODEL["text_cfg"]
        )
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
        self.draw = random.Random(args.seed)
        self.numbers = np.random.default_rng(args.seed)
        own = set(pairs.classes.names)
        self.pools = [
            Pool(pairs, own & pairs.by_name.keys(), 1.0),
            Pool(pairs, pairs.by_name.keys() - own, 1.5),
        ]
        self.step = 0
        self.images = 0
        self.seconds = 0.0
        self.decayed = 0

    def one_step(self, rate: float) -> float:
        """Train on one batch; returns its loss."""
        args = self.args
        pairs = self.pairs
        model = self.model
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
        of_classes = round(args.names * args.class_share)
        names = [
            *self.pools[0].draw(of_classes, self.numbers),
            *self.pools[1].draw(args.names - of_classes, self.numbers),
        ]
        rows, captions = pairs.batch(names, self.draw)
        pixels = augment(pairs.pixels[rows], pairs.black[rows], pairs.one_way[rows])
        model.visual.patch_dropout.index = inked(pixels, args.patches)
        # The fused attention of CPUs is slow in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16), sdpa_kernel(SDPBackend.MATH):
            images = encode_image(model, pixels)
            texts = encode_text(model, self.words(captions))
        loss = contrast(images, texts, model.logit_scale.exp())
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        self.images += len(rows)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            weight = 1 - min(args.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.parameters()), list(model.parameters()), weight)
        return loss.item()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Zero-shot accuracy in % of the running average on the classes, by set that training does
        not see.
        """
        pairs = self.pairs
        average = self.average
        lines = [
            [t.format(name) for name in split_label(line) for t in TEMPLATES]
            for line in pairs.classes.prompt_lines
        ]
        texts = encode_text(average, self.words([text for line in lines for text in line]))
        heads = torch.stack([own.mean(0) for own in texts.split([len(line) for line in lines])])
        heads = F.normalize(heads, dim=-1)
        found = {}
        for name, rows in sorted(pairs.validation.items()):
            truth = torch.tensor(
                [pairs.classes.names.index(pairs.meaning[pairs.words[row]]) for row in rows]
            )
            images = torch.cat(
                [
                    encode_image(average, on_paper(pairs.pixels[part]))
                    for part in torch.tensor(rows).split(128)
                ]
            )
            found[name] = round(
                100 * (images @ heads.T).argmax(1).eq(truth).float().mean().item(), 2
            )
        return {"mean": round(sum(found.values()) / len(found), 2), **found}

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on as this one would have."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": [
                torch.get_rng_state(),
                self.draw.getstate(),
                self.numbers.bit_generator.state,
            ],
            "counts": [self.step, self.images, self.seconds, self.decayed],
            "used": self.words.used,
        }

    def load(self, path: Path, fresh_decay: bool) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        if state["used"] != self.words.used:
            raise SystemExit(
                f"{path} was trained on other words than --pairs has; name the same pairs, or start"
                " anew"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        torch.set_rng_state(state["random"][0])
        self.draw.setstate(state["random"][1])
        self.numbers.bit_generator.state = state["random"][2]
        self.step, self.images, self.seconds, self.decayed = state["counts"]
        self.decayed = 0 if fresh_decay else self.decayed


def train(args: argparse.Namespace) -> None:
    """Train until the steps are done or a signal comes; either way the checkpoint and the model are
    written.
    """
    torch.set_num_threads(args.threads)
    training = Training(Pairs(args.pairs), args)
    own = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if own.is_file() or args.start:
        training.load(own if own.is_file() else args.start, fresh_decay=not own.is_file())
    names = len(training.pairs.by_name)
    print(f"{names} names, {len(training.words.used)} tokens, step {training.step}", flush=True)
    stopped: list[int] = []
    with handled(lambda number, _: stopped.append(number), signal.SIGTERM, signal.SIGINT):
        losses: list[float] = []
        saved = measured = began = time.monotonic()
        before = training.seconds
        while (
            not stopped
            and training.step != args.steps
            and not (args.decay and training.decayed >= args.decay)
        ):
            rate = min((training.step + 1) / args.warmup, 1.0)
            if args.decay:
                rate *= 1 - training.decayed / args.decay
                training.decayed += 1
            losses.append(training.one_step(rate))
            now = time.monotonic()
            training.seconds = before + now - began
            last = (
                bool(stopped)
                or training.step == args.steps
                or (args.decay and training.decayed >= args.decay)
            )
            if now - measured > args.measure_every or last:
                record(training, losses, args.out)
                losses = []
                measured = time.monotonic()
            if now - saved > args.save_every or last:
                with staged(own) as part:
                    torch.save(training.state(), part)
                save(training.average, training.words.used, args.out / "base")
                saved = time.monotonic()


def record(training: Training, losses: list[float], folder: Path) -> None:
    """A line of the curve, on screen and in `curve.jsonl`, and its picture."""
    loss = sum(losses) / len(losses)
    line = {
        "step": training.step,
        "images": training.images,
        "seconds": round(training.seconds),
        "loss": round(loss, 4),
    }
    line |= {"accuracy": training.validate()}
    print(json.dumps(line), flush=True)
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    lines = [
        json.loads(row) for row in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [row["images"] / 1000 for row in lines]
    left.plot(seen, [row["loss"] for row in lines])
    left.set(xlabel="drawings trained on, thousands", ylabel="loss")
    for name in lines[-1]["accuracy"]:
        right.plot(seen, [row["accuracy"].get(name) for row in lines], label=name)
    right.set(
        xlabel="drawings trained on, thousands", ylabel="zero-shot top-1 on validation sets, %"
    )
    right.legend()
    figure.savefig(folder / "curve.png", dpi=100)


def save(model: nn.Module, used: list[int], folder: Path) -> None:
    """Write an open_clip folder: fp16 weights, the whole vocabulary, unused words at zero."""
    state = {
        name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()
    }
    state.pop("attn_mask", None)
    words = torch.zeros(
        MODEL["text_cfg"]["vocab_size"], MODEL["text_cfg"]["width"], dtype=torch.half
    )
    words[used] = state["token_embedding.weight"]
    state["token_embedding.weight"] = words
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    with staged(folder / "open_clip_model.safetensors") as part:
        save_file(state, part)


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="folder of benchmarks.drawings.pairs")
    add(
        "--out",
        type=Path,
        required=True,
        help="checkpoint, curve and model; a checkpoint that is there is gone on from",
    )
    add("--start", type=Path, help="checkpoint of another run to start from")
    add(
        "--steps",
        type=int,
        default=-1,
        help="steps in all; none by default, it trains until SIGTERM",
    )
    add(
        "--decay",
        type=int,
        default=0,
        help="take the rate down to zero within this many steps, then end",
    )
    add("--names", type=int, default=128, help="names, and captions, a step; each has two drawings")
    add(
        "--class-share",
        type=float,
        default=0.5,
        help="share of a step's names that are the benchmark's classes",
    )
    add("--patches", type=int, default=14, help="patches of an image that a step looks at, of 36")
    add("--learning-rate", type=float, default=2e-3, help="level rate of Muon and AdamW")
    add("--warmup", type=int, default=100, help="steps in which the rate rises")
    add(
        "--average", type=float, default=0.998, help="momentum of the running average that is saved"
    )
    add("--measure-every", type=float, default=600, help="seconds between points of the curve")
    add("--save-every", type=float, default=180, help="seconds between checkpoints")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="products in bfloat16, sums in float32",
    )
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="seeds the weights, captions and augmentation")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
