from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.convnext import checkpoint_filter_fn

from fcmae.config import PretrainConfig
from fcmae.layouts import make_layout
from fcmae.model import FCMAE
from fcmae.networks.convnext import VARIANTS, Encoder
from fcmae.training import checkpoint
from fcmae.weights.convert import (
    adapt_in_chans,
    build_dense,
    check,
    convert,
    create_dense,
    save_dense,
    start_from,
)
from fcmae.weights.files import Weights, encoder_output, read_weights
from fcmae.weights.formats import FORMATS, Architecture, rename, to_state


def write_checkpoint(out: Path, **model: object) -> tuple[Path, FCMAE]:
    """A pretraining checkpoint as a run leaves it, with random weights."""
    in_chans = int(model.pop("in_chans", 3))
    data = {"path": ["x"], "in_chans": in_chans, "image_size": 64}
    if in_chans not in (1, 3):
        data |= {"mean": [0.5] * in_chans, "std": [0.25] * in_chans}
    cfg = PretrainConfig.model_validate({"out": out, "data": data, "model": {"decoder_dim": 16, **model}})
    net = FCMAE(Encoder(cfg.model.variant, in_chans, cfg.model.stem_stride), decoder_dim=16)
    randomize(net, std=0.1)
    meta = checkpoint.Meta("pretrain", 3, cfg.model_dump(mode="json"), "fingerprint")
    return checkpoint.save(out, meta, {"model": net.state_dict()}), net


def dense_features(net: FCMAE, images: torch.Tensor) -> torch.Tensor:
    """The sparse encoder's features with nothing masked, (B, C, h, w)."""
    stride = net.encoder.total_stride
    mask = torch.zeros(len(images), images.shape[2] // stride, images.shape[3] // stride, dtype=torch.bool)
    layout = make_layout("packed", mask)
    return layout.unpack(net.encoder(images, layout)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_masked_equals_timm_dense_model(variant: str) -> None:
    # Neither is initialised twice, and the state is moved, not copied: huge has 657 million parameters.
    with torch.device("meta"):
        encoder, dense = Encoder(variant), create_dense(variant)
    encoder.to_empty(device="cpu")
    randomize(encoder, std=0.02)  # keeps activations of the deep variants in float32's comfortable range
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    dense.load_state_dict(to_state(state, variant, "timm"), assign=True)
    images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        layout = make_layout("packed", torch.zeros(1, 2, 1, dtype=torch.bool))
        ours = layout.unpack(encoder(images, layout)).permute(0, 3, 1, 2)
        theirs = dense.stages(dense.stem(images))
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("variant", ["convnextv2_atto", "convnext_atto", "convnext_tiny"])
def test_gradients_equal_timm_dense_model(variant: str, stem_stride: int) -> None:
    net = FCMAE(Encoder(variant, stem_stride=stem_stride), decoder_dim=8).double()
    randomize(net, std=0.1)
    dense = create_dense(variant, stem_stride=stem_stride).double()
    dense.load_state_dict(to_state(net.state_dict(), variant, "timm"))
    images = torch.randn(2, 3, 16 * stem_stride, 8 * stem_stride, dtype=torch.float64)
    dense_features(net, images).square().mean().backward()
    dense.stages(dense.stem(images)).square().mean().backward()
    theirs = dict(dense.named_parameters())
    for name, p in net.encoder.named_parameters():
        grad = theirs[rename(f"encoder.{name}", "timm")].grad
        torch.testing.assert_close(p.grad, grad.view_as(p), atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize(("in_chans", "stem_stride"), [(3, 4), (1, 4), (5, 1)])
def test_timm_loads_the_directory_strictly(tmp_path: Path, in_chans: int, stem_stride: int) -> None:
    _, net = write_checkpoint(tmp_path / "run", in_chans=in_chans, stem_stride=stem_stride)
    (tmp_path / "run" / "config.yaml").write_text("# a run\n")
    text = convert(tmp_path / "run", tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = torch.randn(1, in_chans, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.stages(model.stem(images)), dense_features(net, images), atol=1e-4, rtol=1e-4)
    assert model.pretrained_cfg["input_size"] == (in_chans, 64, 64)
    assert len(model.pretrained_cfg["mean"]) == in_chans
    assert model.head.norm.weight.eq(1).all()
    assert "left out, as timm has no place for them: mask_token, proj.weight" in text
    assert "read the same tensors back" in text
    origin = read_weights(tmp_path / "out").origin
    assert origin["step"] == 3
    assert len(origin["config_sha256"]) == 64


def test_our_export_does_not_claim_timms_licence_and_origin(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "out", "timm")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "license" not in text
    assert "facebook" not in text


def test_a_stride_2_stem_comes_back_through_our_loader(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run", stem_stride=2)
    convert(place, tmp_path / "out", "timm")
    model = build_dense(read_weights(tmp_path / "out"))
    images = torch.randn(1, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.stages(model.stem(images)), dense_features(net, images), atol=1e-4, rtol=1e-4)


def test_the_fair_file_is_what_timm_takes_for_released_weights(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "fair.safetensors", "fair")
    state = load_file(tmp_path / "fair.safetensors")
    model = timm.create_model("convnextv2_atto", num_classes=0)
    filtered = checkpoint_filter_fn(dict(state), model)
    ours = build_dense(read_weights(tmp_path / "fair.safetensors")).state_dict()
    assert filtered.keys() == {name for name in ours if not name.startswith("head.norm")}
    for name, value in filtered.items():
        assert torch.equal(value, ours[name]), name
    assert all(torch.equal(state[k], v) for k, v in net.encoder.state_dict().items())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists: give a new path"):
        convert(place, tmp_path / "mine", "timm")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run, checkpoint, timm or transformers directory"):
        read_weights(tmp_path)


@pytest.mark.parametrize("where", ["model", "args"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, where: str) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "owned",))

    content = {"model": Encoder("convnextv2_atto").state_dict(), where: Malicious()}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth holds more than tensors and was not loaded"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_flags_beside_released_weights_are_let_through(tmp_path: Path, zipped: bool) -> None:
    state = Encoder("convnextv2_atto").state_dict()
    content = {"model": state, "args": argparse.Namespace(lr=1e-4, model="convnextv2_atto"), "epoch": 799}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "a.pth")
    assert (read.format, read.architecture.variant, read.origin) == ("fair", "convnextv2_atto", {"file": "a.pth"})
    assert all(torch.equal(read.state[f"encoder.{name}"], value) for name, value in state.items())
    # Loading one file must not open the door for others' code.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x00" * 64])
def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"model": [1]}, {"model": {"a": 1}}, torch.ones(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "config",
    ["", "[]", "{}", '{"architecture": "resnet50"}', '{"architecture": "local-dir:x"}', '{"model_type": "vit"}'],
)
def test_a_directory_with_another_config_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    save_file({"stem.0.weight": torch.ones(1, 1, 1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_weights(tmp_path)


def test_the_head_is_kept_or_made_new(tmp_path: Path) -> None:
    model = create_dense("convnextv2_atto", num_classes=3)
    randomize(model)
    image = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    save_dense(tmp_path / "tuned", model, Weights({}, Architecture("convnextv2_atto"), image, ("a", "b", "c")))
    read = read_weights(tmp_path / "tuned")
    assert (read.class_names, read.image) == (("a", "b", "c"), image)
    kept = build_dense(read)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.state_dict().items())
    fresh = build_dense(read, num_classes=7)
    assert fresh.head.fc.weight.shape == (7, 320)
    assert torch.equal(fresh.head.norm.weight, model.head.norm.weight)


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_file_says_of_itself_survives_every_format(tmp_path: Path, to: str) -> None:
    place, net = write_checkpoint(tmp_path / "run", in_chans=5)
    dest = tmp_path / ("out" if to in ("timm", "transformers") else "out.safetensors")
    text = convert(place, dest, to)
    assert "read the same tensors back" in text
    assert "is as expected" in check(dest)
    read = read_weights(dest)
    assert (read.format, read.architecture.variant, read.architecture.in_chans) == (to, "convnextv2_atto", 5)
    assert (read.image["mean"], read.image["input_size"], read.origin["step"]) == ([0.5] * 5, [5, 64, 64], 3)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in read.state.items())
    # And on from there, as a .pth file.
    convert(dest, tmp_path / "back.pth", "fcmae")
    again = read_weights(tmp_path / "back.pth")
    assert (again.image, again.origin, again.expected_output) == (read.image, read.origin, read.expected_output)
    assert all(torch.equal(value, read.state[name]) for name, value in again.state.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("variant", "stem_stride"), [("convnextv2_atto", 4), ("convnextv2_atto", 2), ("convnext_tiny", 4)]
)
def test_transformers_loads_our_export_and_computes_timms_features(
    tmp_path: Path, variant: str, stem_stride: int
) -> None:
    transformers = pytest.importorskip("transformers")
    place, _ = write_checkpoint(tmp_path / "run", variant=variant, stem_stride=stem_stride)
    convert(place, tmp_path / "out", "transformers")
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = model.eval()(images)
        dense = build_dense(read_weights(place)).eval()
        features = dense.forward_features(images)
        scale = float(features.abs().max())
        torch.testing.assert_close(theirs.last_hidden_state, features, atol=1e-5 * scale, rtol=1e-5)
        torch.testing.assert_close(theirs.pooler_output, dense(images), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_classifies_as_our_fine_tuned_export(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = create_dense("convnextv2_atto", num_classes=3).eval()
    randomize(model, std=0.1)
    save_dense(tmp_path / "timm", model, Weights({}, Architecture("convnextv2_atto"), class_names=("a", "b", "c")))
    convert(tmp_path / "timm", tmp_path / "hf", "transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, model(images), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    read = read_weights(tmp_path / "again")
    assert read.class_names == ("a", "b", "c")
    assert all(torch.equal(value, read.state[name]) for name, value in read_weights(tmp_path / "timm").state.items())


def test_a_dry_run_prints_the_mapping_and_writes_nothing(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    text = convert(place, None, "timm")
    assert "encoder.stages.0.0.grn.gamma -> stages.0.blocks.0.mlp.grn.weight (160,)" in text
    assert "identity -> head.norm.weight (320,)" in text
    text = convert(place, None, "minkowski")
    assert "encoder.stages.0.1.dwconv.weight -> encoder.stages.0.1.dwconv.kernel (49, 40)" in text
    assert text.endswith("dry run: nothing was written")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dest", ["out", "out.bin"])
def test_a_file_needs_a_files_name(tmp_path: Path, dest: str) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=r"give it a name in \.safetensors, \.pth, \.pt"):
        convert(place, tmp_path / dest, "fair")
    with pytest.raises(ValueError, match="the format timm is a directory"):
        convert(place, tmp_path / "out.safetensors", "timm")


def test_the_expected_output_is_that_of_the_encoder_with_nothing_masked() -> None:
    net = FCMAE(Encoder("convnextv2_atto"), decoder_dim=16)
    randomize(net, std=0.1)
    image = torch.arange(3 * 64 * 64, dtype=torch.float64).sin().float().view(1, 3, 64, 64)
    with torch.no_grad():
        features = dense_features(net, image).mean((0, 2, 3))
    output = encoder_output(Weights(net.state_dict(), Architecture("convnextv2_atto", 3, 4, 1, 16)))
    torch.testing.assert_close(torch.tensor(output), features[::20], atol=1e-5 * float(features.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("damaged", ["stages.0.blocks.0.conv_dw.weight", "stages.3.downsample.1.weight"])
def test_check_finds_a_damaged_or_transposed_weight(tmp_path: Path, damaged: str) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "out", "timm")
    assert "as expected" in check(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(file).items()}
    state[damaged] = state[damaged].transpose(2, 3).contiguous()
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(state, file, metadata)
    with pytest.raises(ValueError, match="the encoder's output is off by"):
        check(tmp_path / "out")


def test_check_says_when_a_file_does_not_tell(tmp_path: Path) -> None:
    save_file(Encoder("convnextv2_atto").state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not say what to expect of it"):
        check(tmp_path / "a.safetensors")


def test_rgb_weights_adapt_as_timm_adapts_them(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    weights = read_weights(place)
    stem = net.encoder.downsample_layers[0][0].weight
    grey, five = adapt_in_chans(weights, 1), adapt_in_chans(weights, 5)
    images = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        # A grey image gives what its copy in three channels gave.
        model = build_dense(grey)
        torch.testing.assert_close(
            model.forward_features(images), dense_features(net, images.expand(1, 3, 64, 64)), atol=1e-3, rtol=1e-3
        )
    held = five.state["encoder.downsample_layers.0.0.weight"]
    torch.testing.assert_close(held, stem.data[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert (five.architecture.in_chans, five.image, five.expected_output) == (5, {}, ())
    assert "pred.weight" not in five.state
    with pytest.raises(ValueError, match=r"only those of 3 \(RGB\) adapt"):
        adapt_in_chans(five, 4)


@pytest.mark.parametrize("to", FORMATS)
def test_pretraining_starts_from_every_format(tmp_path: Path, to: str) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    dest = tmp_path / ("out" if to in ("timm", "transformers") else "out.pth")
    convert(place, dest, to)
    model = FCMAE(Encoder("convnextv2_atto"), decoder_dim=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = start_from(model, read_weights(dest))
    has_decoder = to in ("fcmae", "minkowski")
    assert text.endswith("; decoder too" if has_decoder else "; a fresh decoder, as model.init has none")
    for name, value in model.state_dict().items():
        taken = has_decoder or name.startswith("encoder.")
        assert torch.equal(value, net.state_dict()[name] if taken else before[name]), name


def test_a_decoder_that_does_not_fit_starts_fresh(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    wider = FCMAE(Encoder("convnextv2_atto"), decoder_dim=24)
    assert start_from(wider, read_weights(place)).endswith("model.init has one of depth 1 and width 16 for 3 channels")
    grey = FCMAE(Encoder("convnextv2_atto", in_chans=1), decoder_dim=16)
    text = start_from(grey, read_weights(place))
    assert "its stem adapted from 3 channels to 1; a fresh decoder" in text
    assert torch.equal(grey.encoder.stages[0][0].dwconv.weight, net.encoder.stages[0][0].dwconv.weight)


@pytest.mark.parametrize("other", [{"variant": "convnextv2_femto"}, {"variant": "convnextv2_atto", "stem_stride": 2}])
def test_starting_from_another_network_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=r"set model\.variant and model\.stem_stride to those of model\.init"):
        start_from(FCMAE(Encoder(**other), decoder_dim=16), read_weights(place))


def test_weights_of_16_bits_are_read_and_kept(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in Encoder("convnextv2_atto").state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "timm")
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.parametrize("to", ["timm", "fair"])
def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))

    def broken(path: Path, *_: object) -> None:
        path.write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "write_tensors", broken)
    with pytest.raises(OSError, match="the disk is full"):
        convert(place, tmp_path / ("out" if to == "timm" else "out.safetensors"), to)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_reads_back_otherwise_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    write = checkpoint.write_tensors

    def zeroed(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        write(path, tensors | {"pred.weight": torch.zeros_like(tensors["pred.weight"])}, metadata)

    monkeypatch.setattr(checkpoint, "write_tensors", zeroed)
    with pytest.raises(ValueError, match=r"is not what is read back: pred\.weight"):
        convert(place, tmp_path / "out.safetensors", "fcmae")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_damaged_source_is_not_converted(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "a.pth", "fcmae")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["model"]["encoder.stages.1.0.pwconv1.weight"].mul_(1.5)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: the encoder's output is off by"):
        convert(tmp_path / "a.pth", tmp_path / "out")
    torch.save({"model": {k: v * torch.nan for k, v in net.state_dict().items()}}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: the encoder's output is not finite"):
        convert(tmp_path / "b.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    state = Encoder("convnextv2_atto").state_dict()
    zeros = torch.zeros(40)
    state |= {"stages.0.0.dwconv.bias": zeros, "stages.0.1.dwconv.bias": zeros}
    torch.save(state, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "out", "timm")
    assert load_file(tmp_path / "out" / "model.safetensors")["stages.0.blocks.1.conv_dw.bias"].eq(0).all()


@pytest.mark.parametrize(
    "record",
    [
        3,
        "{",
        "[1]",
        '{"image": {"input_size": 7}}',
        '{"image": {"input_size": [3, -64, 64]}}',
        '{"image": {"std": [0, 0, 0]}}',
        '{"expected_output": "none"}',
    ],
)
def test_a_record_that_is_not_ours_is_refused_in_a_sentence(tmp_path: Path, record: object) -> None:
    torch.save({"model": Encoder("convnextv2_atto").state_dict(), "fcmae": record}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: its record 'fcmae' is not one of ours"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(40, dtype=torch.int64),
        torch.ones(40).to_sparse(),
        torch.ones(1).expand(40),
        1.0,
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path: Path, value: object) -> None:
    state = Encoder("convnextv2_atto").state_dict() | {"stages.0.0.dwconv.bias": value}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "a.pth")


def test_another_entry_of_a_file_is_read_when_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = Encoder("convnextv2_atto").state_dict()
    average = {name: value * 2 for name, value in state.items()}
    torch.save({"model": state, "model_ema": average, "optimizer": {"lr": 1}}, tmp_path / "a.pth")
    with caplog.at_level("WARNING", logger="fcmae"):
        assert torch.equal(read_weights(tmp_path / "a.pth").state["encoder.stages.0.0.norm.weight"], torch.ones(40))
    assert "reading 'model'; it also has 'model_ema'" in caplog.text
    read = read_weights(tmp_path / "a.pth", key="model_ema")
    assert torch.equal(read.state["encoder.stages.0.0.norm.weight"], torch.full((40,), 2.0))
    with pytest.raises(ValueError, match="has no entry 'ema': it has 'model', 'model_ema', 'optimizer'"):
        read_weights(tmp_path / "a.pth", key="ema")
    with pytest.raises(ValueError, match="is a directory, and 'ema' names an entry"):
        read_weights(tmp_path, key="ema")


@pytest.mark.parametrize("size", [96, {"shortest_edge": 96}, {"height": 96, "width": 96}])
def test_the_image_processor_of_transformers_is_read(tmp_path: Path, size: object) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "hf", "transformers")
    written = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (written["size"], written["crop_pct"]) == ({"shortest_edge": 64}, 1.0)
    state = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(state, tmp_path / "hf" / "model.safetensors")  # as others write it, without our record
    changed = written | {"size": size, "image_std": [0.5] * 3}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(changed))
    image = read_weights(tmp_path / "hf").image
    assert (image["input_size"], image["std"], image["crop_pct"]) == ([3, 96, 96], [0.5] * 3, 1.0)


def test_transformers_shards_are_joined_and_stay_in_their_directory(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "hf", "transformers")
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    names = list(state)
    parts = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    for part, held in parts.items():
        save_file({name: state[name].clone() for name in held}, tmp_path / "hf" / part)
    file.unlink()
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, held in parts.items() for name in held}}))
    read = read_weights(tmp_path / "hf")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in read.state.items())
    assert read.image["mean"] == pytest.approx([0.485, 0.456, 0.406])  # of preprocessor_config.json
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="names files of other directories"):
        read_weights(tmp_path / "hf")


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "out", "timm")
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == mode
    assert (place / "model.safetensors").stat().st_mode == mode
