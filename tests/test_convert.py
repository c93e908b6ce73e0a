from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file
from timm.models.convnext import checkpoint_filter_fn

from fcmae import checkpoint
from fcmae.config import PretrainConfig
from fcmae.convert import (
    Weights,
    build_dense,
    convert,
    create_dense,
    fair_to_timm,
    load_dense,
    read_fair,
    read_weights,
    save_timm_directory,
)
from fcmae.encoder import VARIANTS, Encoder
from fcmae.model import FCMAE
from fcmae.sparse import make_layout


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
    state = {fair_to_timm(k): v for k, v in encoder.state_dict().items()}
    shapes = dense.state_dict()
    state = {k: v.reshape(shapes[k].shape) for k, v in state.items()}
    dense.load_state_dict(state, strict=False, assign=True)
    assert [k for k in shapes if k not in state] == ["head.norm.weight", "head.norm.bias"]
    images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        layout = make_layout("packed", torch.zeros(1, 2, 1, dtype=torch.bool))
        ours = layout.unpack(encoder(images, layout)).permute(0, 3, 1, 2)
        theirs = dense.stages(dense.stem(images))
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("variant", ["convnextv2_atto", "convnext_tiny"])
def test_gradients_equal_timm_dense_model(variant: str, stem_stride: int) -> None:
    net = FCMAE(Encoder(variant, stem_stride=stem_stride), decoder_dim=8).double()
    randomize(net, std=0.1)
    state = net.encoder.state_dict()
    dense, _ = build_dense(Weights(state, variant, 3, stem_stride))
    dense = dense.double()
    load_dense(dense, state)
    images = torch.randn(2, 3, 16 * stem_stride, 8 * stem_stride, dtype=torch.float64)
    dense_features(net, images).square().mean().backward()
    dense.stages(dense.stem(images)).square().mean().backward()
    theirs = dict(dense.named_parameters())
    for name, p in net.encoder.named_parameters():
        grad = theirs[fair_to_timm(name)].grad
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
    assert "encoder." not in text
    assert "stages.0.0.grn.gamma -> stages.0.blocks.0.mlp.grn.weight (160,)" in text
    source = json.loads((tmp_path / "out" / "config.json").read_text())["fcmae"]
    assert source["step"] == 3
    assert len(source["config_sha256"]) == 64


def test_our_export_does_not_claim_timms_licence_and_origin(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "out", "timm")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "license" not in text
    assert "facebook" not in text


def test_a_stride_2_stem_comes_back_through_our_loader(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run", stem_stride=2)
    convert(place, tmp_path / "out", "timm")
    model, _ = build_dense(read_weights(tmp_path / "out"))
    images = torch.randn(1, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.stages(model.stem(images)), dense_features(net, images), atol=1e-4, rtol=1e-4)


def test_the_fair_file_is_what_timm_takes_for_released_weights(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "fair.safetensors", "fair")
    state = load_file(tmp_path / "fair.safetensors")
    model = timm.create_model("convnextv2_atto", num_classes=0)
    filtered = checkpoint_filter_fn(dict(state), model)
    ours, _ = build_dense(read_fair(tmp_path / "fair.safetensors", "convnextv2_atto"))
    for name, value in filtered.items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert all(torch.equal(state[k], v) for k, v in net.encoder.state_dict().items())


def test_every_misfit_is_listed_and_nothing_is_loaded() -> None:
    state = dict(Encoder("convnextv2_atto").state_dict())
    del state["stages.3.1.pwconv2.bias"]
    state["stages.0.0.dwconv.weight"] = torch.ones(40, 1, 5, 5)
    state["surplus"] = torch.ones(2)
    model = create_dense("convnextv2_atto")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit ConvNeXt") as error:
        load_dense(model, state)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "shape: stages.0.0.dwconv.weight is (40, 1, 5, 5), stages.0.blocks.0.conv_dw.weight needs (40, 1, 7, 7)",
        "extra: surplus (2,)",
        "missing: stages.3.blocks.1.mlp.fc2.bias (320,)",
    ]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_another_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        build_dense(Weights(dict(Encoder("convnextv2_atto").state_dict()), "convnextv2_femto", 3, 4))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists: give a new path"):
        convert(place, tmp_path / "mine", "timm")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run, checkpoint or timm directory"):
        read_weights(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"model": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_fair(tmp_path / "bad.pth", "convnextv2_atto")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x00" * 64])
def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_fair(tmp_path / name, "convnextv2_atto")


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"architecture": "resnet50"}', '{"architecture": "local-dir:x"}'])
def test_a_directory_with_another_config_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    save_file({"stem.0.weight": torch.ones(1, 1, 1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_weights(tmp_path)


def test_a_file_cannot_have_timm_load_something_else(tmp_path: Path) -> None:
    state = {"downsample_layers.0.0.weight": torch.ones(40, 3, 4, 4)}
    save_file(state, tmp_path / "a.safetensors", {"variant": "hf-hub:somebody/something"})
    with pytest.raises(ValueError, match="is of variant 'hf-hub:somebody/something'"):
        read_fair(tmp_path / "a.safetensors")


def test_the_fair_file_keeps_variant_and_statistics(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run", in_chans=5)
    convert(place, tmp_path / "fair.safetensors", "fair")
    read = read_fair(tmp_path / "fair.safetensors")
    assert (read.variant, read.in_chans, read.image["mean"]) == ("convnextv2_atto", 5, [0.5] * 5)


def test_the_head_is_kept_or_made_new(tmp_path: Path) -> None:
    model = create_dense("convnextv2_atto", num_classes=3)
    with torch.no_grad():
        model.head.fc.weight.normal_()
    weights = Weights({}, "convnextv2_atto", 3, 4, {"mean": [0.5] * 3, "std": [0.5] * 3}, ("a", "b", "c"))
    save_timm_directory(tmp_path, model, weights)
    read = read_weights(tmp_path)
    assert read.class_names == ("a", "b", "c")
    kept, _ = build_dense(read)
    assert torch.equal(kept.head.fc.weight, model.head.fc.weight)
    fresh, _ = build_dense(read, num_classes=7)
    assert fresh.head.fc.weight.shape == (7, 320)
