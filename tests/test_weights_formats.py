"""Names, shapes and kernel layouts of every format, against the real models wherever there are some."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import CONVNEXTS, randomize, requires_minkowski
from torch import Tensor

from fcmae.layouts import Packed
from fcmae.masked import build_fcmae
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec, describe
from fcmae.weights.convert import build_encoder
from fcmae.weights.files import read_weights
from fcmae.weights.formats import (
    FORMATS,
    MMPRETRAIN,
    OLD,
    Architecture,
    detect,
    from_state,
    holds,
    network_in,
    rename,
    to_state,
    unwrapped,
)

ATTO = VARIANTS["convnextv2_atto"]
READABLE = (*FORMATS, OLD, MMPRETRAIN)
# Of odd sizes, so that no two of their shapes are alike.
ODD = ConvNeXtSpec(depths=(1, 2, 3, 1), dims=(6, 10, 14, 18))
ODD_V1 = ODD.model_copy(update={"use_grn": False})
THREE_STAGES = ConvNeXtSpec(depths=(1, 1, 1), dims=(6, 10, 14), stem_stride=2, kernel_size=5)
TWO_STAGES = ConvNeXtSpec(depths=(2, 1), dims=(6, 10), stem_stride=3, kernel_size=9, use_grn=False)
OWN_WIDTHS = ConvNeXtSpec(depths=(1, 2), dims=(6, 10), stem_stride=1, hidden=((7,), (33, 40)))


def weights(spec: ConvNeXtSpec, in_chans: int = 3, num_classes: int = 0) -> dict[str, Tensor]:
    """Random tensors of an encoder, a decoder of depth 2, and with classes a final norm and a head."""
    architecture = Architecture(spec, in_chans, 2, 12, num_classes > 0, num_classes)
    return {name: torch.randn(shape) for name, shape in architecture.shapes().items()}


@pytest.mark.parametrize("variant", CONVNEXTS)
def test_names_and_shapes_are_timms(variant: str) -> None:
    spec = VARIANTS[variant]
    shapes = Architecture(spec, final_norm=True, num_classes=7).shapes()
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = timm.create_model(variant, num_classes=7).state_dict()
    converted = to_state(state, spec, "timm")
    assert {name: value.shape for name, value in converted.items()} == {k: v.shape for k, v in theirs.items()}


def test_names_and_shapes_are_those_of_the_released_sparse_model() -> None:
    with torch.device("meta"):
        state = build_fcmae(Encoder(ATTO)).state_dict()
    released = {name: tuple(value.shape) for name, value in to_state(state, ATTO, "minkowski").items()}
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
        state = build_fcmae(Encoder(ATTO)).state_dict()
    fair = {name: tuple(value.shape) for name, value in to_state(state, ATTO, "fair").items()}
    assert fair["downsample_layers.0.0.weight"] == (40, 3, 4, 4)
    assert fair["stages.2.5.grn.gamma"] == (1, 1, 1, 640)
    assert not any(name.startswith(("norm", "head", "encoder", "decoder")) for name in fair)


def test_names_and_shapes_of_mmpretrain() -> None:
    """Those of the modules in its ConvNeXt and GRN, mmpretrain/models/backbones/convnext.py and utils/norm.py."""
    state = {name: value for name, value in weights(ATTO).items() if holds(name, MMPRETRAIN)}
    theirs = to_state(state, ATTO, MMPRETRAIN)
    theirs = {name: value.flatten() if ".grn." in name else value for name, value in theirs.items()}
    expected = {
        "downsample_layers.0.0.weight": (40, 3, 4, 4),
        "downsample_layers.1.1.weight": (80, 40, 2, 2),
        "stages.2.5.depthwise_conv.weight": (160, 1, 7, 7),
        "stages.2.5.norm.weight": (160,),
        "stages.2.5.pointwise_conv1.weight": (640, 160),
        "stages.2.5.pointwise_conv2.bias": (160,),
        "stages.2.5.grn.gamma": (640,),
    }
    assert {name: tuple(theirs[name].shape) for name in expected} == expected
    _, source, ours, _ = from_state(theirs | {"norm3.weight": torch.ones(320) * 2, "norm3.bias": torch.zeros(320)})
    assert source == MMPRETRAIN and (ours["norm.weight"] == 2).all()
    assert all(torch.equal(ours[name], value) for name, value in state.items())


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("spec", [ATTO, ODD, TWO_STAGES, OWN_WIDTHS], ids=describe)
@pytest.mark.parametrize("to", READABLE)
def test_a_round_trip_is_exact_to_the_bit(to: str, spec: ConvNeXtSpec, num_classes: int) -> None:
    if spec.depths == ATTO.depths:
        spec = spec.model_copy(update={"stem_stride": 2})
    state = weights(spec, in_chans=5, num_classes=num_classes)
    theirs = to_state(state, spec, to)
    for asked in (spec, None):
        architecture, source, ours, names = from_state(theirs, asked)
        assert source == to
        assert (architecture.spec, architecture.in_chans) == (spec, 5)
        assert ours.keys() == {name for name in state if holds(name, to)}
        assert all(torch.equal(value, state[name]) for name, value in ours.items())
    assert {name: unwrapped(theirs) for name, theirs in names.items()} == {name: rename(name, to) for name in ours}
    again = to_state(ours, spec, to)
    assert list(again) == list(theirs)
    assert all(torch.equal(value, theirs[name]) and value.shape == theirs[name].shape for name, value in again.items())


@pytest.mark.parametrize("variant", CONVNEXTS)
@pytest.mark.parametrize("source", FORMATS)
def test_the_variant_is_found_out(variant: str, source: str) -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in Architecture(VARIANTS[variant]).shapes().items()}
    theirs = to_state(state, VARIANTS[variant], source)
    for parameter in ("weight", "bias"):
        theirs.pop(rename(f"norm.{parameter}", source), None)
    architecture, *_ = from_state(theirs)
    assert architecture.spec == VARIANTS[variant]


@pytest.mark.parametrize(
    ("spec", "change"), [(THREE_STAGES, "missing"), (THREE_STAGES, "misshapen"), (TWO_STAGES, "missing")]
)
@pytest.mark.parametrize("source", READABLE)
def test_the_network_is_found_out_with_any_one_entry_missing_or_misshapen(
    source: str, spec: ConvNeXtSpec, change: str
) -> None:
    whole = to_state(weights(spec, num_classes=3), spec, source)
    for name in whole:
        state = dict(whole)
        if change == "missing":
            del state[name]
        else:
            state[name] = torch.ones(2, 3, 11, 13)
        with pytest.raises(ValueError, match=f"in {source}'s layout, are not those of") as error:
            from_state(state)
        sentence, *listed = str(error.value).splitlines()
        kind = {"missing": "missing", "misshapen": "shape"}[change]
        assert listed[0].strip().startswith(f"{kind}: {unwrapped(name)} ")
        if unwrapped(name) != rename("encoder.downsample_layers.0.0.weight", source):  # which alone tells the stride
            assert sentence.endswith(f"are not those of {describe(spec)}:"), name
            assert len(listed) == 1, (name, listed)


def test_timms_identity_norm_counts_as_none_and_a_trained_one_stays() -> None:
    model = timm.create_model("convnextv2_atto", num_classes=0)
    architecture, _, ours, _ = from_state(model.state_dict())
    assert not architecture.final_norm
    assert "norm.weight" not in ours
    torch.nn.init.normal_(model.head.norm.weight)
    architecture, _, ours, _ = from_state(model.state_dict())
    assert architecture.final_norm
    assert torch.equal(ours["norm.weight"], model.head.norm.weight)


@pytest.mark.parametrize("kernel_size", [3, 7, 9])
def test_kernel_offsets_have_the_first_axis_fastest(kernel_size: int) -> None:
    spec = ODD.model_copy(update={"kernel_size": kernel_size})
    state = weights(spec)
    theirs = to_state(state, spec, "minkowski")
    depthwise, kernel = state["encoder.stages.1.0.dwconv.weight"], theirs["encoder.stages.1.0.dwconv.kernel"]
    down, down_kernel = state["encoder.downsample_layers.1.1.weight"], theirs["encoder.downsample_layers.1.1.kernel"]
    for row in range(kernel_size):
        for column in range(kernel_size):
            assert torch.equal(kernel[row + kernel_size * column], depthwise[:, 0, row, column])
    for row in range(2):
        for column in range(2):
            assert torch.equal(down_kernel[row + 2 * column], down[:, :, row, column].T)


@requires_minkowski
def test_the_released_model_computes_what_our_encoder_and_timm_do(tmp_path: Path) -> None:
    """A released-layout file, made of real MinkowskiEngine modules, against its conversions with nothing masked."""
    from released import ReleasedEncoder

    released = ReleasedEncoder(ATTO)
    randomize(released, std=0.1)
    with torch.device("meta"):
        names = {k: v for k, v in build_fcmae(Encoder(ATTO)).state_dict().items() if k.startswith("decoder.")}
    state = {f"encoder.{name}": value for name, value in released.state_dict().items()}
    state |= {rename(name, "minkowski"): torch.randn(value.shape) for name, value in names.items()}
    torch.save({"model": state}, tmp_path / "released.pth")

    read = read_weights(tmp_path / "released.pth")
    assert read.format == "minkowski"
    images = torch.randn(1, 3, 64, 96)
    dense = timm.create_model("convnextv2_atto", num_classes=0)
    dense.load_state_dict(to_state(read.state, ATTO, "timm"))
    encoder, layout = build_encoder(read), Packed(torch.zeros(1, 2, 3, dtype=torch.bool), 6)
    with torch.no_grad():
        theirs = released(images)
        tolerance = {"atol": 1e-4 * float(theirs.abs().max()), "rtol": 1e-4}
        torch.testing.assert_close(dense.forward_features(images), theirs, **tolerance)
        torch.testing.assert_close(encoder(images).permute(0, 3, 1, 2), theirs, **tolerance)
        packed = layout.unpack(encoder(images, layout)).permute(0, 3, 1, 2)
        torch.testing.assert_close(packed, theirs, **tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("spec", [ATTO, VARIANTS["convnext_tiny"], ODD_V1], ids=describe)
def test_names_and_shapes_are_those_of_transformers(spec: ConvNeXtSpec, num_classes: int) -> None:
    transformers = pytest.importorskip("transformers")
    family = "ConvNextV2" if spec.use_grn else "ConvNext"
    numbers = {"depths": spec.depths, "hidden_sizes": spec.dims, "num_labels": num_classes or 2}
    config = getattr(transformers, f"{family}Config")(**numbers)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{'ForImageClassification' if num_classes else 'Model'}")(config)
    theirs = {name: torch.empty_like(value, device="cpu").normal_() for name, value in model.state_dict().items()}
    _, source, ours, _ = from_state(theirs)
    assert source == "transformers"
    again = to_state(ours, spec, "transformers")
    assert {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in again.items()}


def test_wrappers_prefixes_are_no_part_of_a_name() -> None:
    state = weights(ODD)
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    _, source, ours, names = from_state(wrapped, ODD)
    assert source == "fcmae"
    assert ours.keys() == state.keys()
    assert names["decoder.mask_token"] == "module._orig_mod.decoder.mask_token"
    with pytest.raises(ValueError, match="differ only in a wrapper's prefix"):
        from_state(wrapped | state)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
@pytest.mark.parametrize("source", READABLE)
def test_wrappers_inside_names_are_no_part_of_them(source: str, wrapper: str) -> None:
    state = weights(ODD)
    names = {name: name.replace("stages.1.", f"stages.1.{wrapper}.") for name in to_state(state, ODD, source)}
    wrapped = {names[name]: value for name, value in to_state(state, ODD, source).items()}
    _, found, ours, originals = from_state({f"_forward_module.{name}": value for name, value in wrapped.items()})
    assert found == source
    assert all(torch.equal(value, state[name]) for name, value in ours.items())
    assert all(originals[name] == f"_forward_module.{names[rename(name, source)]}" for name in ours)


@pytest.mark.parametrize("prefix", ["net.", "student.", "teacher.backbone.", "encoder.", "net.encoder.", "model."])
@pytest.mark.parametrize("source", READABLE)
def test_the_prefix_before_a_networks_names_is_found(source: str, prefix: str) -> None:
    names = list(to_state(weights(ODD, num_classes=3), ODD, source))
    found, inside = network_in([f"{prefix}{name}" for name in names] + ["criterion.weight", "epoch"])
    assert found == prefix
    assert {unwrapped(name): f"{prefix}{name}" for name in names} == inside


def test_names_in_messages_are_shown_as_escapes() -> None:
    state = {name: value for name, value in weights(ODD).items() if not name.startswith("decoder.")}
    with pytest.raises(ValueError, match=r"extra: \\x1b\[31m\\n\\udcff \(2,\)"):
        from_state(state | {"\x1b[31m\n\udcff": torch.ones(2)})
    with pytest.raises(ValueError, match=r"the entries \(\\x1b, "):
        detect(["\x1b"])


def test_bare_names_have_no_prefix_and_a_loss_functions_weights_are_left_out() -> None:
    names = list(weights(ODD))
    assert network_in([*names, "criterion.weight", "loss.0.weight"]) == ("", {name: name for name in names})


def test_one_of_several_networks_is_named() -> None:
    names = list(weights(ODD))
    both = [f"{who}.backbone.{name}" for who in ("student", "teacher") for name in names] + ["student.head.weight"]
    with pytest.raises(ValueError, match=r"under 'student\.backbone\.', 'teacher\.backbone\.': name one with --prefix"):
        network_in(both)
    for prefix in ("student", "student.", "student.backbone", "module.student"):
        found, inside = network_in(both, prefix)
        assert (found, list(inside)) == ("student.backbone.", names)
    with pytest.raises(ValueError, match=r"no entry is under the prefix 'ema\.': there is a network under 'student"):
        network_in(both, "ema")
    # A network's average beside it.
    averaged = [*names, *(f"ema.{name}" for name in names)]
    with pytest.raises(ValueError, match=r"under '', 'ema\.': name one with --prefix"):
        network_in(averaged)
    assert network_in(averaged, "") == ("", {name: name for name in names})
    assert network_in(averaged, "ema") == ("ema.", {name: f"ema.{name}" for name in names})


def test_shapes_that_no_network_has_are_refused_in_a_sentence() -> None:
    state = to_state(weights(ODD), ODD, "fair") | {"downsample_layers.0.0.weight": torch.ones(6, 3, 1000, 1)}
    with pytest.raises(ValueError, match=r"^the shapes are of no ConvNeXt: its stem_stride would be 1000: ") as error:
        from_state(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", READABLE)
def test_everything_missing_extra_and_misshapen_is_listed(source: str) -> None:
    state = to_state(weights(ODD, num_classes=3), ODD, source)
    prefix = "convnextv2." if source == "transformers" else ""
    lost = prefix + rename("encoder.stages.2.2.pwconv2.bias", source)
    odd = prefix + rename("encoder.downsample_layers.2.1.weight", source)
    shape = tuple(state[odd].shape)
    del state[lost]
    state[odd] = torch.ones(2, 3)
    state["surplus"] = torch.ones(4)
    for asked in (ODD, None):
        with pytest.raises(ValueError, match=f"in {source}'s layout, are not those of {describe(ODD)}:\n") as error:
            from_state(state, asked)
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
            f"shape: {odd.removeprefix(prefix)} is (2, 3), {describe(ODD)} needs {shape}",
            f"missing: {lost.removeprefix(prefix)} (14,)",
            "extra: surplus (4,)",
        ]


def test_a_head_without_its_norm_is_refused() -> None:
    state = to_state(weights(ODD, num_classes=3), ODD, "fair")
    del state["norm.weight"], state["norm.bias"]
    with pytest.raises(ValueError, match=r"missing: norm\.weight \(18,\)"):
        from_state(state, ODD)


def test_another_variant_is_refused() -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in Architecture(ATTO).shapes().items()}
    with pytest.raises(ValueError, match=r"not those of convnextv2_femto \(they look like convnextv2_atto\)") as error:
        from_state(state, VARIANTS["convnextv2_femto"])
    assert "shape: encoder.stages.0.0.dwconv.bias is (40,), convnextv2_femto needs (48,)" in str(error.value)


def test_a_block_that_is_missing_among_others_is_listed() -> None:
    tiny = VARIANTS["convnextv2_tiny"]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in Architecture(tiny).shapes().items()}
    cut = {name: value for name, value in state.items() if not name.startswith("encoder.stages.2.7.")}
    with pytest.raises(ValueError, match=r"are not those of ") as error:
        from_state(cut)
    assert "missing: encoder.stages.2.7.dwconv.weight" in str(error.value)
    cut = {name: value for name, value in state.items() if not name.startswith("encoder.stages.2.8.")}
    with pytest.raises(ValueError, match=r"not those of convnextv2_tiny \(they look like .* 3-3-8-3,") as error:
        from_state(cut, tiny)
    assert "missing: encoder.stages.2.8.dwconv.weight" in str(error.value)


@pytest.mark.parametrize("names", [[], ["conv1.weight", "fc.bias"], ["blocks.0.attn.qkv.weight"]])
def test_other_networks_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="are of no ConvNeXt in a format of"):
        detect(names)
