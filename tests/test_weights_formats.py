"""Names, shapes and kernel layouts of every format, against the real models wherever there are some."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize, requires_minkowski
from torch import Tensor

from fcmae.layouts import Masked, make_layout
from fcmae.model import FCMAE
from fcmae.networks.convnext import VARIANTS, Encoder, Variant
from fcmae.weights.convert import build_dense
from fcmae.weights.files import Weights, read_weights
from fcmae.weights.formats import FORMATS, Architecture, detect, from_state, holds, rename, to_state, unwrapped

V1_AND_V2 = ["convnextv2_atto", "convnext_atto", "convnext_tiny"]


def small(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """A variant of odd sizes under a real one's name, so that no two of its shapes are alike."""
    monkeypatch.setitem(VARIANTS, variant, Variant((1, 2, 3, 1), (6, 10, 14, 18), VARIANTS[variant].use_grn))


def weights(variant: str, stem_stride: int = 4, in_chans: int = 3, num_classes: int = 0) -> dict[str, Tensor]:
    """Random tensors of an encoder, a decoder of depth 2, and with classes a final norm and a head."""
    architecture = Architecture(variant, in_chans, stem_stride, 2, 12, num_classes > 0, num_classes)
    return {name: torch.randn(shape) for name, shape in architecture.shapes().items()}


def dense_features(encoder: Encoder, images: Tensor) -> Tensor:
    features: Tensor = encoder(images, Masked(None)).permute(0, 3, 1, 2)
    return features


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_timms(variant: str) -> None:
    shapes = Architecture(variant, final_norm=True, num_classes=7).shapes()
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = timm.create_model(variant, num_classes=7).state_dict()
    converted = to_state(state, variant, "timm")
    assert {name: value.shape for name, value in converted.items()} == {k: v.shape for k, v in theirs.items()}


def test_names_and_shapes_are_those_of_the_released_sparse_model() -> None:
    with torch.device("meta"):
        state = FCMAE(Encoder("convnextv2_atto")).state_dict()
    released = {name: tuple(value.shape) for name, value in to_state(state, "convnextv2_atto", "minkowski").items()}
    expected = {
        "encoder.downsample_layers.0.0.weight": (40, 3, 4, 4),
        "encoder.downsample_layers.0.0.bias": (40,),
        "encoder.downsample_layers.0.1.weight": (40,),
        "encoder.downsample_layers.1.0.ln.weight": (40,),
        "encoder.downsample_layers.1.1.kernel": (4, 40, 80),
        "encoder.downsample_layers.1.1.bias": (1, 80),
        "encoder.stages.0.0.dwconv.kernel": (49, 40),
        "encoder.stages.0.0.dwconv.bias": (1, 40),
        "encoder.stages.0.0.norm.ln.bias": (40,),
        "encoder.stages.0.0.pwconv1.linear.weight": (160, 40),
        "encoder.stages.0.0.grn.gamma": (1, 160),
        "encoder.stages.0.0.pwconv2.linear.bias": (40,),
        "proj.weight": (512, 320, 1, 1),
        "mask_token": (1, 512, 1, 1),
        "decoder.0.dwconv.weight": (512, 1, 7, 7),
        "decoder.0.norm.weight": (512,),
        "decoder.0.pwconv1.weight": (2048, 512),
        "decoder.0.grn.gamma": (1, 1, 1, 2048),
        "pred.weight": (3072, 512, 1, 1),
    }
    assert {name: released.get(name) for name in expected} == expected
    assert len(released) == len(state)


def test_names_of_the_released_dense_model() -> None:
    with torch.device("meta"):
        state = FCMAE(Encoder("convnextv2_atto")).state_dict()
    fair = {name: tuple(value.shape) for name, value in to_state(state, "convnextv2_atto", "fair").items()}
    assert fair["downsample_layers.0.0.weight"] == (40, 3, 4, 4)
    assert fair["stages.2.5.grn.gamma"] == (1, 1, 1, 640)
    assert not any(name.startswith(("norm", "head", "encoder", "decoder")) for name in fair)


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("variant", V1_AND_V2)
@pytest.mark.parametrize("to", FORMATS)
def test_a_round_trip_is_exact_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, to: str, variant: str, num_classes: int
) -> None:
    small(monkeypatch, variant)
    state = weights(variant, stem_stride=2, in_chans=5, num_classes=num_classes)
    theirs = to_state(state, variant, to)
    architecture, source, ours, names = from_state(theirs, variant)
    assert source == to
    assert (architecture.in_chans, architecture.stem_stride) == (5, 2)
    assert ours.keys() == {name for name in state if holds(name, to)}
    assert all(torch.equal(value, state[name]) for name, value in ours.items())
    assert {name: unwrapped(theirs) for name, theirs in names.items()} == {name: rename(name, to) for name in ours}
    again = to_state(ours, variant, to)
    assert list(again) == list(theirs)
    assert all(torch.equal(value, theirs[name]) and value.shape == theirs[name].shape for name, value in again.items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", FORMATS)
def test_the_variant_is_found_out(variant: str, source: str) -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in Architecture(variant).shapes().items()}
    theirs = to_state(state, variant, source)
    for parameter in ("weight", "bias"):
        theirs.pop(rename(f"norm.{parameter}", source), None)
    architecture, *_ = from_state(theirs)
    assert architecture.variant == variant


def test_timms_identity_norm_counts_as_none_and_a_trained_one_stays() -> None:
    model = timm.create_model("convnextv2_atto", num_classes=0)
    architecture, _, ours, _ = from_state(model.state_dict())
    assert not architecture.final_norm
    assert "norm.weight" not in ours
    torch.nn.init.normal_(model.head.norm.weight)
    architecture, _, ours, _ = from_state(model.state_dict())
    assert architecture.final_norm
    assert torch.equal(ours["norm.weight"], model.head.norm.weight)


def test_kernel_offsets_have_the_first_axis_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "convnextv2_atto")
    state = weights("convnextv2_atto")
    theirs = to_state(state, "convnextv2_atto", "minkowski")
    depthwise, kernel = state["encoder.stages.1.0.dwconv.weight"], theirs["encoder.stages.1.0.dwconv.kernel"]
    down, down_kernel = state["encoder.downsample_layers.1.1.weight"], theirs["encoder.downsample_layers.1.1.kernel"]
    for row in range(7):
        for column in range(7):
            assert torch.equal(kernel[row + 7 * column], depthwise[:, 0, row, column])
    for row in range(2):
        for column in range(2):
            assert torch.equal(down_kernel[row + 2 * column], down[:, :, row, column].T)


@requires_minkowski
def test_the_released_model_computes_what_our_dense_encoder_and_timm_do(tmp_path: Path) -> None:
    """A released-layout file, made of real MinkowskiEngine modules, against its conversions with nothing masked."""
    from released import ReleasedEncoder

    released = ReleasedEncoder("convnextv2_atto")
    randomize(released, std=0.1)
    decoder = FCMAE(Encoder("convnextv2_atto"))
    state = {f"encoder.{name}": value for name, value in released.state_dict().items()}
    state |= {name: value for name, value in decoder.state_dict().items() if not name.startswith("encoder.")}
    torch.save({"model": state}, tmp_path / "released.pth")

    read = read_weights(tmp_path / "released.pth")
    assert read.format == "minkowski"
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = released(images)
        dense = build_dense(read)
        torch.testing.assert_close(
            dense.forward_features(images), theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4
        )
        encoder = Encoder("convnextv2_atto")
        encoder.load_state_dict(
            {k.removeprefix("encoder."): v for k, v in read.state.items() if k.startswith("encoder.")}
        )
        layout = make_layout("packed", torch.zeros(1, 2, 3, dtype=torch.bool))
        packed = layout.unpack(encoder(images, layout)).permute(0, 3, 1, 2)
        torch.testing.assert_close(packed, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("variant", V1_AND_V2)
def test_names_and_shapes_are_those_of_transformers(variant: str, num_classes: int) -> None:
    transformers = pytest.importorskip("transformers")
    depths, dims, use_grn = VARIANTS[variant]
    family = "ConvNextV2" if use_grn else "ConvNext"
    config = getattr(transformers, f"{family}Config")(depths=depths, hidden_sizes=dims, num_labels=num_classes or 2)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{'ForImageClassification' if num_classes else 'Model'}")(config)
    theirs = {name: torch.empty_like(value, device="cpu").normal_() for name, value in model.state_dict().items()}
    _, source, ours, _ = from_state(theirs)
    assert source == "transformers"
    again = to_state(ours, variant, "transformers")
    assert {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in again.items()}


def test_wrappers_prefixes_are_no_part_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "convnextv2_atto")
    state = weights("convnextv2_atto")
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    _, source, ours, names = from_state(wrapped, "convnextv2_atto")
    assert source == "fcmae"
    assert ours.keys() == state.keys()
    assert names["mask_token"] == "module._orig_mod.mask_token"
    with pytest.raises(ValueError, match="differ only in a wrapper's prefix"):
        from_state(wrapped | state)


@pytest.mark.parametrize("source", FORMATS)
def test_everything_missing_extra_and_misshapen_is_listed(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    small(monkeypatch, "convnextv2_atto")
    state = to_state(weights("convnextv2_atto", num_classes=3), "convnextv2_atto", source)
    prefix = "convnextv2." if source == "transformers" else ""
    lost = prefix + rename("encoder.stages.2.2.pwconv2.bias", source)
    odd = prefix + rename("encoder.downsample_layers.2.1.weight", source)
    shape = tuple(state[odd].shape)
    del state[lost]
    state[odd] = torch.ones(2, 3)
    state["surplus"] = torch.ones(4)
    with pytest.raises(ValueError, match=f"in {source}'s layout, are not those of convnextv2_atto") as error:
        from_state(state, "convnextv2_atto")
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        f"shape: {odd.removeprefix(prefix)} is (2, 3), convnextv2_atto needs {shape}",
        f"missing: {lost.removeprefix(prefix)} (14,)",
        "extra: surplus (4,)",
    ]


def test_a_head_without_its_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "convnextv2_atto")
    state = to_state(weights("convnextv2_atto", num_classes=3), "convnextv2_atto", "fair")
    del state["norm.weight"], state["norm.bias"]
    with pytest.raises(ValueError, match=r"missing: norm\.weight \(18,\)"):
        from_state(state, "convnextv2_atto")


def test_another_variant_is_refused() -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in Architecture("convnextv2_atto").shapes().items()}
    with pytest.raises(ValueError, match=r"not those of convnextv2_femto \(they look like convnextv2_atto\)") as error:
        from_state(state, "convnextv2_femto")
    assert "shape: encoder.stages.0.0.dwconv.bias is (40,), convnextv2_femto needs (48,)" in str(error.value)


def test_the_nearest_variant_is_named_when_blocks_are_missing() -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in Architecture("convnextv2_tiny").shapes().items()}
    cut = {name: value for name, value in state.items() if not name.startswith("encoder.stages.2.8.")}
    with pytest.raises(ValueError, match=r"not those of convnextv2_tiny:\n  missing: encoder.stages.2.8.dwconv.weight"):
        from_state(cut)


@pytest.mark.parametrize("names", [[], ["conv1.weight", "fc.bias"], ["blocks.0.attn.qkv.weight"]])
def test_other_networks_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="are of no ConvNeXt in a format of"):
        detect(names)


def test_weights_of_another_stem_stride_build_timms_model() -> None:
    state = weights("convnextv2_atto", stem_stride=2)
    model = build_dense(Weights(state, Architecture("convnextv2_atto", stem_stride=2)))
    images = torch.randn(1, 3, 32, 16)
    encoder = Encoder("convnextv2_atto", stem_stride=2)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    with torch.no_grad():
        theirs = model.forward_features(images)
        torch.testing.assert_close(
            dense_features(encoder, images), theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3
        )
