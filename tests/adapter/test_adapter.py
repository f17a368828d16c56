"""The adapter against torch's own maths: what it computes, what it leaves alone, what it folds
to.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from radapter_serve.adapter import (
    Adapter,
    Metadata,
    attach,
    attach_adapter,
    base_digest,
    find_sites,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.errors import RAdapterError

TEXTS = ["a cat", "!? a !longer text about dogs and !x", "", "a cat"]


@pytest.fixture(scope="module")
def model(tiny_clip_dir: str) -> nn.Module:
    return load_base(tiny_clip_dir).model


@pytest.fixture
def inputs(tiny_clip_dir: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32), open_clip.get_tokenizer(tiny_clip_dir)(TEXTS)


def random_adapter(model: nn.Module, rank: int | None = None, std: float = 0.1) -> Adapter:
    sites = find_sites(model)
    torch.manual_seed(2)
    tensors = {}
    for site in sites:
        d = site.layer.out_features
        if rank is None:
            tensors[site.key] = torch.randn(d, d) * std
        else:
            tensors[f"{site.key}.up"] = torch.randn(d, rank) * std
            tensors[f"{site.key}.down"] = torch.randn(rank, d) * std
    digest = base_digest(model.state_dict(), [site.key for site in sites])
    return Adapter(tensors, Metadata(architecture="tiny", base_digest=digest, rank=rank))


def test_vit_b_32_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
        adapters = attach(model)
    assert sum(p.numel() for p in adapters.parameters()) == 20_447_232  # 20.45 M, Table 1
    assert "20,447,232 parameters, 13.52 %" in adapters.summary(model)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("form", ["activation", "weight"])
def test_no_effect_at_the_start_and_none_left_behind(
    model: nn.Module, inputs: tuple[Tensor, Tensor], rank: int | None, form: Any
) -> None:
    pixels, tokens = inputs
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = encode_image(model, pixels), encode_text(model, tokens)
        adapters = attach(model, rank, form=form)
        found = encode_image(model, pixels), encode_text(model, tokens)
    adapters.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


class PlainAdapter(nn.Module):
    """The paper's adapter as it is written: behind a module, X·W_adp + X, no re-parametrization
    anywhere.
    """

    def __init__(self, inner: nn.Module, matrix: Tensor, gate: float) -> None:
        super().__init__()
        self.inner = inner
        self.w_adp = nn.Parameter(matrix.T.clone())
        self.gate = gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        x = out[0] if isinstance(out, tuple) else out
        x = self.gate * (x @ self.w_adp) + x
        return (x, *out[1:]) if isinstance(out, tuple) else x


@pytest.mark.parametrize("form", ["activation", "weight"])
def test_gradients_are_those_of_a_plain_adapter(
    model: nn.Module, inputs: tuple[Tensor, Tensor], form: Any
) -> None:
    pixels, tokens = inputs
    adapter = random_adapter(model)
    plain = copy.deepcopy(model).requires_grad_(False)
    ours = attach_adapter(model, adapter, 1.0, form=form)
    ours.drop = 0.5
    torch.manual_seed(3)
    ours.sample_drop()
    gates = [layer.gate for layer in ours._adapters()]
    assert set(gates) == {0.0, 2.0}
    reference = {}
    modules = dict(plain.named_modules())
    for key, gate in zip((site.key for site in ours.sites), gates, strict=True):
        place = key.removesuffix(".out_proj")  # the adapter sits behind the attention as a whole
        parent, _, name = place.rpartition(".")
        reference[key] = PlainAdapter(modules[place], adapter.tensors[key], gate)
        setattr(modules[parent], name, reference[key])
    try:
        for m in (plain, model):
            (
                plain_loss := (encode_image(m, pixels) * encode_text(m, tokens).roll(1, 0)).sum()
            ).backward()
            assert plain_loss.isfinite()
        for site, layer in zip(ours.sites, ours._adapters(), strict=True):
            expected = reference[site.key].w_adp.grad
            assert expected is not None and layer.full.grad is not None
            torch.testing.assert_close(layer.full.grad, expected.T, rtol=1e-3, atol=1e-6)
    finally:
        ours.remove()


def test_only_adapters_train_and_the_rest_stays_to_the_bit(
    model: nn.Module, inputs: tuple[Tensor, Tensor]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = attach(model, rank=4, form="weight")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        encode_image(model, inputs[0]).sum().backward()
        optimizer.step()
    assert all(
        p.grad is None
        for n, p in model.named_parameters()
        if "original" in n or "parametrizations" not in n
    )
    assert any(
        p.detach().abs().max() > 0 for n, p in adapters.named_tensors().items() if n.endswith(".up")
    )
    adapters.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("form", ["activation", "weight"])
def test_folded_equals_attached(
    model: nn.Module, inputs: tuple[Tensor, Tensor], rank: int | None, form: Any
) -> None:
    pixels, tokens = inputs
    adapter = random_adapter(model, rank)
    folded = copy.deepcopy(model)
    folded.load_state_dict(fold(model.state_dict(), adapter, 0.7))
    adapters = attach_adapter(model, adapter, 0.7, form=form)
    with torch.no_grad():
        attached = encode_image(model, pixels), encode_text(model, tokens)
        adapters.remove()
        torch.testing.assert_close(encode_image(folded, pixels), attached[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(encode_text(folded, tokens), attached[1], rtol=0, atol=1e-5)
        assert (encode_image(model, pixels) - attached[0]).abs().max() > 1e-3


@settings(max_examples=10, deadline=None)
@given(alpha=st.floats(0, 1))
def test_fold_is_linear_in_alpha(model: nn.Module, alpha: float) -> None:
    base = model.state_dict()
    adapter = random_adapter(model)
    one = fold(base, adapter, 1.0)
    mixed = fold(base, adapter, alpha)
    for name, value in base.items():
        if name.rpartition(".")[0] not in adapter.keys:
            assert mixed[name] is value
            continue
        expected = (1 - alpha) * value.double() + alpha * one[name].double()
        torch.testing.assert_close(mixed[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_fold_by_hand() -> None:
    state = {
        "a.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "a.bias": torch.tensor([1.0, -1.0]),
    }
    f = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    adapter = Adapter({"a": f}, Metadata(architecture="x", base_digest=base_digest(state, ["a"])))
    folded = fold(state, adapter, 0.5)
    assert folded["a.weight"].tolist() == [[3.0, 4.5, 6.0], [5.0, 7.0, 9.0]]
    assert folded["a.bias"].tolist() == [0.5, 0.0]


def test_fold_computes_in_fp32_and_casts_once(model: nn.Module) -> None:
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    adapter = random_adapter(model)
    wide = {
        name: value.float() if value.is_floating_point() else value for name, value in half.items()
    }
    adapter = Adapter(
        adapter.tensors, Metadata(architecture="tiny", base_digest=base_digest(wide, adapter.keys))
    )
    expected = fold(wide, adapter, 0.5)
    for name, value in fold(half, adapter, 0.5).items():
        assert value.dtype == half[name].dtype
        assert torch.equal(value, expected[name].to(value.dtype))


def test_fold_refuses_values_that_are_not_finite(model: nn.Module) -> None:
    adapter = random_adapter(model)
    adapter.tensors[adapter.keys[0]][0] = 3e38  # finite, but not its product
    with pytest.raises(
        RAdapterError, match=r"not finite in transformer\.resblocks\.0\.attn\.out_proj\.weight"
    ):
        fold(model.state_dict(), adapter, 1.0)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_alpha_out_of_range(model: nn.Module, alpha: float) -> None:
    with pytest.raises(RAdapterError, match="alpha is .*allowed"):
        fold(model.state_dict(), random_adapter(model), alpha)


def test_adapter_of_another_base_names_both_digests(model: nn.Module) -> None:
    adapter = random_adapter(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.visual.transformer.resblocks[0].mlp.c_proj.bias[0] += 1e-3  # type: ignore[union-attr,index]
    found = base_digest(other.state_dict(), adapter.keys)
    for action in (
        lambda: fold(other.state_dict(), adapter, 0.5),
        lambda: attach_adapter(other, adapter, 0.5),
    ):
        with pytest.raises(RAdapterError, match="another base") as error:
            action()
        assert found in str(error.value) and adapter.metadata.base_digest in str(error.value)
    assert not list(find_sites(other)[0].output._forward_hooks)


def test_attach_refuses_before_it_changes_anything(tiny_clip_dir: str) -> None:
    normed = load_base(tiny_clip_dir).model
    normed.transformer.resblocks[1].ln_attn = nn.LayerNorm(64)  # type: ignore[union-attr,index]
    convolutional = load_base(tiny_clip_dir).model
    convolutional.visual = nn.Conv2d(3, 8, 3)
    for broken, reason in (
        (normed, r"resblocks\.1\.ln_attn .*stands between .*--partial"),
        (convolutional, r"image tower of CLIP \(Conv2d\) has no blocks .*--partial"),
    ):
        with pytest.raises(RAdapterError, match=reason):
            attach(broken)
        assert all(p.requires_grad for p in broken.parameters())
        assert not any(m._forward_hooks for m in broken.modules())


def test_attach_refuses_twice_and_bad_arguments(model: nn.Module) -> None:
    for form in ("activation", "weight"):
        adapters = attach(model, form=form)
        with pytest.raises(RAdapterError, match="has an adapter already"):
            attach(model)
        adapters.remove()
    for arguments in ({"rank": 0}, {"rank": 64}, {"drop": 1.0}, {"drop": -0.1}):
        with pytest.raises(RAdapterError, match="allowed"):
            attach(model, **arguments)


def test_dropping_draws_one_scaled_gate_an_adapter(model: nn.Module) -> None:
    adapters = attach(model, drop=0.25)
    gates = []
    for step in range(500):
        torch.manual_seed(step)
        adapters.sample_drop()
        gates += [layer.gate for layer in adapters._adapters()]
    adapters.remove()
    assert set(gates) == {0.0, 1 / 0.75}
    assert sum(gates) / len(gates) == pytest.approx(
        1.0, abs=0.03
    )  # 4,000 draws: the mean's deviation is 0.009
    adapters.stop_drop()
    assert {layer.gate for layer in adapters._adapters()} == {1.0}


def test_cropped_and_merged_texts_are_exact(
    model: nn.Module, inputs: tuple[Tensor, Tensor]
) -> None:
    with torch.no_grad():
        expected = model.encode_text(inputs[1], normalize=True)  # type: ignore[operator]
        torch.testing.assert_close(encode_text(model, inputs[1]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_file_round_trip(model: nn.Module, tmp_path: Path, rank: int | None) -> None:
    adapter = random_adapter(model, rank)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    for path in (tmp_path, tmp_path / "adapter.safetensors"):
        loaded = load_adapter(path)
        assert loaded.metadata == adapter.metadata and loaded.digest == adapter.digest
        assert all(
            torch.equal(loaded.tensors[name], value) for name, value in adapter.tensors.items()
        )
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_saving_to_a_full_disk_leaves_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("radapter_serve.adapter.file.save_file", full)
    with pytest.raises(RAdapterError, match="No space left"):
        save_adapter(random_adapter(model), tmp_path / "adapter.safetensors")
    assert list(tmp_path.iterdir()) == []
