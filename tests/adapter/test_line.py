"""Checkpoints that were tuned elsewhere, and LoRA of peft: what is between them and their base."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from radapter_export import ExportSettings
from radapter_export.source import read_source
from radapter_serve.adapter.tuned import load_base_of, load_checkpoint, load_lora
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.transformers import form_of, to_transformers
from radapter_serve.errors import RAdapterError
from tests.helpers.small_models import make_base

pytestmark = [
    # peft asks transformers for a property by its former name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # a pattern that no layer matches is one of the cases
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def tuned(tiny_base: Base) -> dict[str, Tensor]:
    """The weights of the tiny CLIP after some training: all but the positions differ."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor
        if "positional" in name
        else tensor + 0.03 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tiny_base.model.state_dict().items()
    }


def _folder(path: Path, weights: dict[str, Tensor], tiny_clip_dir: str) -> Path:
    """A model's folder like the tiny CLIP's, with other weights."""
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), path)
    save_file(weights, path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize("kind", ["tensors.pt", "training.pt", "weights.safetensors", "folder"])
def test_the_line_is_that_of_wise_ft_to_the_bit(
    tiny_base: Base, tuned: dict[str, Tensor], tiny_clip_dir: str, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind
    if kind == "folder":
        _folder(path, tuned, tiny_clip_dir)
    elif kind == "weights.safetensors":
        save_file(tuned, path)
    elif kind == "tensors.pt":
        torch.save(tuned, path)
    else:  # as open_clip's own training writes it
        named = {f"module.{name}": tensor for name, tensor in tuned.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": named}, path)
    before = copy.deepcopy(tiny_base.model.state_dict())
    base, line = load_checkpoint(str(path), tiny_clip_dir)
    for alpha in (0.0, 0.3, 0.5, 0.995, 1.0):
        weights = line.at(alpha)
        assert list(weights) == list(before)
        for name, tensor in before.items():  # as in the repository of WiSE-FT
            assert torch.equal(weights[name], (1 - alpha) * tensor + alpha * tuned[name]), name
    start = base.model.state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in before.items())
    assert line.made_of.kind == "checkpoint"
    assert line.made_of.name == kind


def test_a_folder_needs_no_base_where_it_is_taken_as_it_is(
    tuned: dict[str, Tensor], tiny_clip_dir: str, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "tuned", tuned, tiny_clip_dir)
    for name in (folder, folder / "open_clip_model.safetensors", f"local-dir:{folder}"):
        line = load_checkpoint(str(name))[1]
        assert all(torch.equal(line.at(1)[key], tensor) for key, tensor in tuned.items())
        with pytest.raises(RAdapterError, match="alpha is 0.5, which needs the weights that"):
            line.at(0.5)


def _with(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Any], Any]:
    """A change of one weight; it is left out if that gives None."""

    def changed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        new = change(weights[name].clone())
        rest = {key: value for key, value in weights.items() if key != name}
        return rest if new is None else {**rest, name: new}

    return changed


_BIAS = "visual.ln_post.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(_BIAS, lambda _: None), "is of another architecture than its base: it has no w"),
        (_with(_BIAS, lambda x: x[:5]), r"its weight visual.ln_post.bias is \[5\], and \[64\]"),
        (_with(_BIAS, lambda x: x.fill_(float("nan"))), "is damaged: its weight visual.ln_post"),
        (lambda weights: {**weights, "head.weight": torch.ones(2)}, "has the weight head.weight"),
        (_with(_BIAS, lambda x: x.to(torch.int8)), r"is torch.int8, .* allowed are plain floating"),
        (lambda weights: {**weights, "x": Path("x")}, "loading them could run foreign code"),
        (None, "could not read the checkpoint .* neither of torch.save nor of safetensors"),
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(
    tuned: dict[str, Tensor], tiny_clip_dir: str, tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "tuned.pt"
    if change is None:
        path.write_bytes(b"no checkpoint")
    else:
        torch.save(change(tuned), path)
    with pytest.raises(RAdapterError, match=message) as error:
        load_checkpoint(str(path), tiny_clip_dir)
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_or_has_no_architecture_is_refused(
    tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(tuned, tmp_path / "tuned.pt")
    for name, base, message in (
        (str(tmp_path / "none.pt"), None, "there is no checkpoint"),
        (str(tmp_path / "tuned.pt"), None, "holds only weights; name what was tuned with --base"),
        (str(tmp_path), None, "is not a model folder"),
        ("ViT-B-32:nobody", None, "pretrained is 'nobody'"),
        (str(tmp_path / "tuned.pt"), "ViT-B-32:nobody", "pretrained is 'nobody'"),
    ):
        with pytest.raises(RAdapterError, match=message):
            load_checkpoint(name, base)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["model_cfg", "quick_gelu"], False, "it has .*GELU, and the base .*QuickGELU"),
        (["model_cfg", "vision_cfg", "head_width"], 16, "of 4 heads, and the base"),
        (["preprocess_cfg", "mean"], [0.5] * 3, "another way than its base: mean is"),
        (["preprocess_cfg", "std"], [0.5] * 3, "another way than its base: std is"),
    ],
)
def test_models_that_compute_differently_are_refused(
    tuned: dict[str, Tensor],
    tiny_clip_dir: str,
    tmp_path: Path,
    keys: list[str],
    value: Any,
    message: str,
) -> None:
    """Neither activations nor heads nor the images' normalisation show in a weight's shape."""
    folder = _folder(tmp_path / "tuned", tuned, tiny_clip_dir)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    *outer, last = keys
    functools.reduce(dict.__getitem__, outer, config)[last] = value
    file.write_text(json.dumps(config))
    with pytest.raises(RAdapterError, match=message):
        load_checkpoint(str(folder), tiny_clip_dir)


@pytest.fixture(scope="module")
def clip_folder(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP as `transformers` has it: without a processor, which peft needs none of."""
    folder = tmp_path_factory.mktemp("transformers") / "clip"
    form = form_of(tiny_base.name, tiny_base.model, tiny_base.tokenizer)
    model = transformers.CLIPModel(transformers.CLIPConfig(**form.config))
    model.load_state_dict(to_transformers(tiny_base.model.state_dict(), form))
    model.save_pretrained(folder)
    return folder


def _trained(folder: Path, out: Path, **config: Any) -> Any:
    """A LoRA of random values, saved; gives the model of peft."""
    import peft  # here: it takes seconds to load

    torch.manual_seed(0)
    usual: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = peft.get_peft_model(
        transformers.CLIPModel.from_pretrained(folder), peft.LoraConfig(**usual | config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(out))
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        {
            "use_rslora": True,
            "target_modules": ["out_proj", "fc1", "fc2", "visual_projection", "text_projection"],
        },
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {
                "proj": 9,  # part of a name: of no layer
                "^q_proj": 7,
                "v_proj": 3,
                "^vision_model.encoder.layers.1.self_attn.q_proj": 5,
            },
        },
    ],
)
def test_a_lora_is_merged_as_peft_merges_it(
    tiny_base: Base, tiny_clip_dir: str, clip_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = _trained(clip_folder, tmp_path / "lora", **config)
    _, line = load_lora(tmp_path / "lora", tiny_clip_dir)
    theirs = model.merge_and_unload().state_dict()
    form = form_of(tiny_base.name, tiny_base.model, tiny_base.tokenizer)
    start, half, ours = (to_transformers(line.at(alpha), form) for alpha in (0, 0.5, 1))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(half[name], (start[name] + tensor) / 2, rtol=0, atol=1e-6)
    assert max((ours[name] - start[name]).abs().max().item() for name in ours) > 0.1


def test_a_lora_of_a_siglip_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    import peft

    base = load_base(make_base("siglip", tmp_path / "base"))
    form = form_of(base.name, base.model, base.tokenizer)
    theirs = transformers.SiglipModel(transformers.SiglipConfig(**form.config))
    theirs.load_state_dict(to_transformers(base.model.state_dict(), form))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "out_proj", "fc1", "text_model.head"])
    model = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(tmp_path / "lora"))
    _, line = load_lora(tmp_path / "lora", base.name)
    ours = to_transformers(line.at(1), form)
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_a_lora_is_of_the_base_that_it_names(
    tiny_clip_dir: str, lora_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora_folder, tmp_path / "lora")
    _edited("base_model_name_or_path", tiny_clip_dir.removeprefix("local-dir:"))(folder)
    settings = ExportSettings(lora=folder)
    source = read_source((), None, settings)
    _, line = source.load(settings)
    assert line.made_of is not None
    assert (source.alphas, line.made_of.kind) == ([1.0], "lora")
    assert line.made_of.base == tiny_clip_dir
    _edited("base_model_name_or_path", None)(folder)
    with pytest.raises(RAdapterError, match="does not say what it was trained on; .* --base"):
        load_lora(folder)


@pytest.fixture(scope="module")
def lora_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "lora"
    _trained(clip_folder, folder)
    return folder


def _edited(name: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return edit


def _reweighted(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return edit


_Q = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edited("peft_type", "LOHA"), "is of the kind LOHA; allowed: LORA"),
        (_edited("use_dora", True), "has use_dora True, which is more than a plain LoRA"),
        (_edited("init_lora_weights", "pissa"), "init_lora_weights pissa, which changes the base"),
        (_edited("alpha_pattern", {"(a+)+$": 1}), "allowed are names of layers"),
        (_edited("lora_alpha", float("nan")), "rank or alpha nan; allowed"),
        (_edited("r", 3), "has rank 4, and 3 according to adapter_config.json"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("["),
            "is not a folder of peft",
        ),
        (_reweighted(lambda w: w[_Q].fill_(float("inf"))), "holds values that are not finite"),
        (_reweighted(lambda w: w.update({"x.lora_embedding_A": w[_Q] + 1})), "has the tensor x.l"),
        (_reweighted(lambda w: w.update({_Q: torch.ones(4, 3)})), "is of another base than"),
    ],
)
def test_bad_loras_are_refused_in_one_line(
    tiny_clip_dir: str,
    lora_folder: Path,
    tmp_path: Path,
    edit: Callable[[Path], Any],
    message: str,
) -> None:
    shutil.copytree(lora_folder, tmp_path / "lora")
    edit(tmp_path / "lora")
    with pytest.raises(RAdapterError, match=message) as error:
        load_lora(tmp_path / "lora", tiny_clip_dir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "where"), [("clip", ", relative to the folder"), ("/no/clip", "")]
)
def test_a_base_that_is_elsewhere_is_named(random_adapter, base, where):
    adapter = random_adapter()
    metadata = dataclasses.replace(adapter.metadata, architecture=f"local-dir:{base}")
    message = f"base is local-dir:{base}{where}.*not there; name it with --base local-dir:FOLDER"
    with pytest.raises(RAdapterError, match=message):
        load_base_of(dataclasses.replace(adapter, metadata=metadata))
