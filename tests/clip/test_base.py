"""Loading a base, with the activation that it was trained with, and without running its code."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save, save_file
from torch.overrides import TorchFunctionMode

from radapter_serve.adapter import load_adapter
from radapter_serve.adapter.tuned import load_lora, read_weights
from radapter_serve.clip.base import load_base
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.data.rows import open_rows
from radapter_serve.errors import RAdapterError
from radapter_serve.release.adapters import read_run
from tests.helpers.small_models import IMAGE, TEXT, make_base, release

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OF_TEXTS = {**TOWER, "hidden_act": "gelu"}
OTHER_TEXTS = "its text embeddings in transformers differ"


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small model that open_clip knows in both activations: NAME and NAME-quickgelu."""
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS)
    )
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    config = {"embed_dim": 32, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "vocab_size": 49408}}
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "tiny-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    return "tiny"


def embeds(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(torch.ones(1, 3, 32, 32).cumsum(2))  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mean", "black", "mean of its preprocess_cfg is black; allowed: three numbers"),
        ("mean", [0.5, 0.5], "mean of its preprocess_cfg"),
        ("mean", [0.5, 0.5, float("nan")], "mean of its preprocess_cfg"),
        ("std", [0.2, 0.0, 0.2], "std of its preprocess_cfg is .*; allowed: three numbers above 0"),
    ],
)
def test_a_preprocessing_that_no_image_passes_is_refused(
    field: str, value: object, words: str, tiny_clip_dir: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(RAdapterError, match=words):
        load_base(f"local-dir:{folder}")


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused(
    name: str, tiny_clip_dir: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(RAdapterError, match=f"{name}: it is not a regular file"):
        load_base(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("tower", "changes", "words"),
    [
        (
            "text_cfg",
            {"layers": 10**9},
            "layers is 1000000000; allowed: at most 1000",
        ),  # builds for hours
        ("text_cfg", {"context_length": 10**5}, "context_length is 100000; allowed"),
        ("vision_cfg", {"width": 32768, "layers": 100}, "width is 32768; allowed"),
        ("preprocess_cfg", {"note": " " * 2**22}, "has more than 4194304 bytes"),
    ],
)
def test_a_configuration_that_takes_hours_or_all_memory_is_refused(
    tower: str, changes: dict[str, Any], words: str, tiny_clip_dir: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    table = config if tower not in config["model_cfg"] else config["model_cfg"]
    table[tower].update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(RAdapterError, match=words):
        load_base(f"local-dir:{folder}")
    path.write_text(json.dumps({"model_cfg": [[]]}))
    with pytest.raises(RAdapterError, match="model_cfg is no table"):
        load_base(f"local-dir:{folder}")


def many_tensors(path: Path) -> None:
    """Write a file of safetensors whose header has 60,000 tensors, which libraries read slowly."""
    header: dict[str, Any] = {
        f"weight{index}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
        for index in range(60_000)
    }
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(4 * len(header)))


def test_files_that_take_all_memory_to_read_are_refused(tiny_clip_dir: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), base)
    tokenizer = base / "tokenizer.json"
    with tokenizer.open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(RAdapterError, match="tokenizer.json: it has 1000000000 bytes.*at most 104"):
        load_base(f"local-dir:{base}")
    with pytest.raises(RAdapterError, match="tokenizer.json: it has 1000000000 bytes.*at most 104"):
        Tokenizer.load(tokenizer, release().tokenizer)
    tokenizer.unlink()

    weights = base / "open_clip_model.safetensors"
    many_tensors(weights)
    message = "open_clip_model.safetensors.* it has a header of [0-9]+ bytes.*at most 4194304"
    reads: list[Callable[[], object]] = [
        lambda: load_base(f"local-dir:{base}"),
        lambda: load_base("ViT-B-32", str(weights)),
        lambda: read_weights(weights),
        lambda: load_adapter(weights),
        lambda: read_run(weights),
    ]
    for read in reads:
        with pytest.raises(RAdapterError, match=message):
            read()
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    weights.rename(lora / "adapter_model.safetensors")
    with pytest.raises(RAdapterError, match="adapter_model.*it has a header of"):
        load_lora(lora)

    # A checkpoint of torch whose archive is compressed unpacks to any size.
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.zeros(100_000)}, plain)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to:
        for entry in source.infolist():
            to.writestr(entry.filename, source.read(entry))
    assert read_weights(plain)["weight"].shape == (100_000,)
    with pytest.raises(RAdapterError, match=r"packed.pt: it has \d+ bytes and unpacks to 40"):
        read_weights(packed)


def test_the_links_of_a_hub_snapshot_are_read(tiny_clip_dir: str, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / "main"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    weights = load_base(f"local-dir:{snapshot}").model.state_dict()
    expected = load_base(tiny_clip_dir).model.state_dict()
    torch.testing.assert_close(dict(weights), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tiny_clip_dir: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), base)
    path = base / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["text_projection"][3, 2] = value
    save_file(weights, path)
    message = f"^local-dir:{base} is damaged: its weight text_projection holds values that are not"
    with pytest.raises(RAdapterError, match=message):
        load_base(f"local-dir:{base}")


@pytest.mark.parametrize(
    ("name", "beside", "quick"),
    [
        ("weights.pt", None, False),
        ("tiny.openai/weights.pt", None, True),
        ("weights.pt", {"quick_gelu": True}, True),
        ("vit-openai.pt", {}, False),
    ],
)
def test_a_local_checkpoint_gets_the_activation_that_it_tells(
    architectures: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    beside: dict[str, bool] | None,
    quick: bool,
) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-quickgelu" if quick else "tiny").eval()
    path = tmp_path / "weights" / name
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    if beside is not None:
        (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": beside}))
    base = load_base(architectures, str(path))
    assert base.config["quick_gelu"] is quick
    torch.testing.assert_close(embeds(base.model), embeds(model))
    told = capsys.readouterr().err
    assert ("name the architecture tiny-quickgelu" in told) == (
        name == "weights.pt" and beside is None
    )
    if beside == {}:
        with pytest.raises(RAdapterError, match="trained with GELU.*name the architecture tiny$"):
            load_base("tiny-quickgelu", str(path))


@pytest.mark.parametrize("name", ["clips/mine", "./mine", "/nowhere/mine"])
def test_a_bare_path_is_told_that_there_is_no_such_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RAdapterError, match=f"^there is no folder {name}; ") as error:
        load_base(name)
    assert len(str(error.value)) < 120
    with pytest.raises(RAdapterError, match=f"is a folder; name it local-dir:{tmp_path}"):
        load_base(str(tmp_path))
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RAdapterError, match="^mine is a folder; name it local-dir:mine$"):
        load_base("mine")


@pytest.mark.parametrize(("tower", "part"), [("image", "vision_cfg"), ("text", "text_cfg")])
def test_a_tower_that_does_not_pool_is_refused(
    tiny_clip_dir: str, tmp_path: Path, tower: str, part: str
) -> None:
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), tmp_path / "base")
    path = tmp_path / "base" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part]["pool_type"] = "none"
    path.write_text(json.dumps(config))
    with pytest.raises(RAdapterError, match=f"its {tower} tower does not pool"):
        load_base(f"local-dir:{tmp_path / 'base'}")


def test_no_weight_is_drawn_before_those_of_the_file_are_read(tiny_clip_dir: str) -> None:
    class Draws(TorchFunctionMode):
        """Counts what is drawn, of all that an inner mode lets through."""

        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func.__name__.endswith(("normal_", "uniform_"))
            return func(*args, **(kwargs or {}))

    folder = Path(tiny_clip_dir.removeprefix("local-dir:"))
    weights = load_file(folder / "open_clip_model.safetensors")
    with Draws() as draws:
        loaded = load_base(tiny_clip_dir).model.state_dict()
    assert draws.count == 0
    torch.testing.assert_close(loaded, weights, rtol=0, atol=0)
    with draws:
        torch.nn.Linear(2, 2)
    assert draws.count == 2


class Line:
    """Pickled, it runs a line of Python when it is loaded."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.line,)


def test_a_checkpoint_is_no_program(architectures: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = Line(f"open({str(mark)!r}, 'w').close()")
    torch.save({"logit_scale": code}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(code))
    np.savez(tmp_path / "big-vision.npz", params=np.array([code], object))
    for name in ("new.pt", "old.pt", "big-vision.npz"):
        with pytest.raises(RAdapterError, match="could not load tiny"):
            load_base(architectures, str(tmp_path / name))
    assert not mark.exists()


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as the library itself writes it, and its model."""
    folder = tmp_path_factory.mktemp("transformers")
    config = transformers.CLIPConfig(
        projection_dim=32,
        vision_config={
            **TOWER,
            "image_size": 32,
            "patch_size": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-4,
        },
        text_config={
            **TOWER,
            "hidden_act": "gelu",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "vocab_size": 49408,
        },
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    clip: Any = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in clip.encoder.items()}
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=list(clip.bpe_ranks), model_max_length=77
    )
    size: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = transformers.CLIPImageProcessor(**size, image_mean=[0.5, 0.4, 0.3])
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder, model


def test_a_base_in_the_form_of_transformers(
    of_transformers: tuple[Path, Any], tmp_path: Path
) -> None:
    """It is read in half precision and in several files, too."""
    folder = tmp_path / "half"
    shutil.copytree(of_transformers[0], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    half = copy.deepcopy(of_transformers[1]).half()
    half.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    base = load_base(f"local-dir:{folder}", "ignored, as for every folder")
    assert (base.pretrained, base.config["quick_gelu"]) == (None, False)
    wanted = {
        "size": (32, 32),
        "mean": [0.5, 0.4, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    assert {name: base.preprocess[name] for name in wanted} == wanted

    # Its embeddings are those of the library's model.
    model: Any = half.float()
    ours: Any = base.model
    pixels = torch.randn(3, 3, 32, 32)
    tokens = base.tokenizer(["a cat", "dogs " * 90, ""])
    with torch.no_grad():
        images = model.get_image_features(pixels).pooler_output
        texts = model.get_text_features(tokens).pooler_output
        torch.testing.assert_close(ours.encode_image(pixels), images, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens), texts, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.logit_scale, model.logit_scale)


def test_a_base_on_the_hub(tiny_clip_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def fetch(name: str, *, revision: str | None, **_: object) -> str:
        names.append(f"{name} at {revision}")
        return tiny_clip_dir.removeprefix("local-dir:")

    def fail(name: str, **_: object) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    base = load_base("hf-hub:someone/clip@v1")
    assert (base.name, names) == ("hf-hub:someone/clip@v1", ["someone/clip at v1"])
    weights = load_base(tiny_clip_dir).model.state_dict()
    torch.testing.assert_close(dict(base.model.state_dict()), dict(weights), rtol=0, atol=0)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = "^could not get hf-hub:someone/clip from .*: no route to host$"
    with pytest.raises(RAdapterError, match=message):
        load_base("hf-hub:someone/clip")


def swap_words(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]


def without_projection(content: bytes) -> bytes:
    weights = load(content)
    del weights["visual_projection.weight"]
    return save(weights, metadata={"format": "pt"})


def changed(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.get("image_processor", config).update(fields)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            changed(model_type="blip"),
            "its model_type is blip; allowed: clip, siglip",
        ),
        ("config.json", changed(text_config={**TOWER, "hidden_act": "relu"}), OTHER_TEXTS),
        ("config.json", changed(text_config={**OF_TEXTS, "eos_token_id": 7}), OTHER_TEXTS),
        ("processor_config.json", changed(do_center_crop=False), "its processor in transformers g"),
        ("processor_config.json", changed(do_normalize=False), "its processor in transformers dif"),
        ("tokenizer.json", swap_words, "its vocabulary is not CLIP's"),
        ("model.safetensors", lambda _: b"{", "could not load"),
        # which the library would fill with random values
        ("model.safetensors", without_projection, "it has no weight visual_projection.weight"),
    ],
)
def test_a_model_that_open_clip_computes_otherwise_is_refused(
    of_transformers: tuple[Path, Any],
    tmp_path: Path,
    file: str,
    change: Callable[[Any], bytes | None],
    message: str,
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(of_transformers[0], folder)
    content = (folder / file).read_bytes()
    if file.endswith(".json"):
        fields = json.loads(content)
        change(fields)
        (folder / file).write_text(json.dumps(fields), encoding="utf-8")
    else:
        (folder / file).write_bytes(change(content) or b"")
    with pytest.raises(RAdapterError, match=message) as error:
        load_base(f"local-dir:{folder}")
    assert "\n" not in str(error.value)


def of_texts(**fields: Any) -> dict[str, Any]:
    return {"model_cfg": {"text_cfg": fields}}


# A file of a folder, what is added to it, and the message; `evil` is a module of the folder.
OURS = "open_clip_config.json"
TRUSTED = of_texts(tokenizer_kwargs={"trust_remote_code": True})
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
CONFIG = {"auto_map": {"AutoConfig": "evil.Evil"}}
OTHER = of_texts(tokenizer_kwargs={"tokenizer_file": "/etc/passwd"})
TIMM = {"model_cfg": {"vision_cfg": {"timm_model_name": "local-dir:."}}}
KERNEL = {"attn_implementation": "someone/kernel"}
HOSTILE: list[tuple[str, dict[str, Any] | str, str]] = [
    (OURS, TRUSTED, "open_clip_config.json has trust_remote_code"),
    (OURS, OTHER, "has tokenizer_kwargs.tokenizer_file.*allowed are clean"),
    (OURS, TIMM, "has timm_model_name local-dir:"),
    ("tokenizer_config.json", TOKENIZER, "tokenizer_config.json has auto_map"),
    ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json: it is not JSON"),
    ("config.json", {"model_type": "own", **CONFIG}, "config.json has auto_map"),
    ("config.json", {"configuration_files": ["config.4.0.json"]}, "has configuration_files"),
    ("text/config.json", CONFIG, "text/config.json has auto_map"),
    ("text/config.json", KERNEL, "text/config.json has attn_implementation someone/kernel"),
    ("adapter_config.json", {"megatron_core": "evil"}, "adapter_config.json, an adapter of peft"),
]


def update(config: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, dict) and name in config:
            update(config[name], value)
        else:
            config[name] = value


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    make_base("roberta", folder / "base")
    return folder / "base"


@pytest.mark.parametrize(("file", "change", "message"), HOSTILE)
def test_a_folder_that_would_run_code_is_refused(
    roberta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change: dict[str, Any] | str,
    message: str,
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # to a library that asks whether it may
    base = tmp_path / "base"
    shutil.copytree(roberta, base)
    mark = tmp_path / "mark"
    line = f"open({str(mark)!r}, 'w').close()"
    (base / "evil.py").write_text(f"{line}\nclass Evil: pass\n")
    fields = json.loads((base / OURS).read_text())
    update(fields, of_texts(hf_model_name=str(base / "text")))
    (base / OURS).write_text(json.dumps(fields))
    if isinstance(change, dict):
        fields = json.loads((base / file).read_text()) if (base / file).is_file() else {}
        update(fields, change)
        (base / file).write_text(json.dumps(fields))
    else:
        (base / file).write_text(change)
    with pytest.raises(RAdapterError, match=message) as caught:
        load_base(f"local-dir:{base}")
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["csv:reference://a.csv::file:///t.json", "csv:zip://a.csv::t.zip", "pandas"]
)
def test_data_that_would_run_code_is_refused(place: str) -> None:
    with pytest.raises(RAdapterError, match="may run foreign code"):
        open_rows(place, {})


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_without_images_only_the_text_tower_is_read(family: str, tmp_path: Path) -> None:
    name = make_base(family, tmp_path / "base")
    whole = load_base(name)
    copied: list[int] = []

    class Copies(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.copy_ and args[0] is not args[1]:
                copied.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Copies():
        part = load_base(name, images=False)
    weights = part.model.state_dict()
    assert weights.keys() == {
        key for key in whole.model.state_dict() if not key.startswith("visual")
    }
    assert sum(copied) == sum(tensor.numel() for tensor in weights.values())
    tokens = part.tokenizer(["a cat", "two dogs"])
    with torch.no_grad():
        assert torch.equal(part.model.encode_text(tokens), whole.model.encode_text(tokens))  # type: ignore[operator]
    assert (part.preprocess, part.config) == (whole.preprocess, whole.config)
    # What is loaded after it has an image tower again.
    assert torch.equal(embeds(load_base(name).model), embeds(whole.model))
