from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.convnext import checkpoint_filter_fn
from torch import nn

import fcmae
from fcmae.config import PretrainConfig
from fcmae.heads import Classifier
from fcmae.masked import FCMAE, build_fcmae, hog, normalized_pixels
from fcmae.networks.build import make_encoder
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec, RoadmapSpec
from fcmae.training import checkpoint
from fcmae.weights import files
from fcmae.weights.convert import (
    adapt_in_chans,
    build_classifier,
    build_encoder,
    check,
    convert,
    save_classifier,
    start_from,
)
from fcmae.weights.files import read_init, read_weights, save_weights
from fcmae.weights.formats import FORMATS, MMEARTH, Architecture, to_state
from fcmae.weights.record import ImageRecord, Weights, encoder_output

ATTO = VARIANTS["convnextv2_atto"]


SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}


def write_checkpoint(out: Path, **model: object) -> tuple[Path, FCMAE]:
    """A pretraining checkpoint as a run leaves it, with random weights."""
    model.setdefault("variant", SMALL)
    in_chans, size = int(model.pop("in_chans", 3)), int(model.pop("image_size", 64))
    data = {"path": ["x"], "in_chans": in_chans, "image_size": size}
    if in_chans not in (1, 3):
        data |= {"mean": [0.5] * in_chans, "std": [0.25] * in_chans}
    cfg = PretrainConfig.model_validate({"out": out, "data": data, "model": {"decoder_dim": 16, **model}})
    target = hog if cfg.model.target == "hog" else normalized_pixels
    net = build_fcmae(Encoder(cfg.model.spec, in_chans), 16, target=target)
    randomize(net, std=0.1)
    config, spec = cfg.model_dump(mode="json"), net.encoder.spec.model_dump()
    meta = checkpoint.Meta("pretrain", 3, config, "fingerprint", spec=spec)
    return checkpoint.save(out, meta, {"model": net.state_dict()}), net


def dense_features(net: FCMAE, images: torch.Tensor) -> torch.Tensor:
    """The encoder's features with nothing masked, (B, C, h, w)."""
    features: torch.Tensor = net.encoder(images).permute(0, 3, 1, 2)
    return features


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
    assert "left out, as timm has no place for them: decoder.mask_token, decoder.proj.weight" in text
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
    text = convert(place, tmp_path / "out", "timm")
    assert text.endswith("# timm has no such network")
    encoder = build_encoder(read_weights(tmp_path / "out"))
    images = torch.randn(1, 3, 32, 16)
    assert torch.equal(encoder(images), net.encoder(images))


def test_the_fair_file_is_what_timm_takes_for_released_weights(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run", variant="convnextv2_atto")
    convert(place, tmp_path / "fair.safetensors", "fair")
    state = load_file(tmp_path / "fair.safetensors")
    model = timm.create_model("convnextv2_atto", num_classes=0)
    filtered = checkpoint_filter_fn(dict(state), model)
    ours = to_state(read_weights(tmp_path / "fair.safetensors").state, ATTO, "timm")
    assert filtered.keys() == {name for name in ours if not name.startswith("head.norm")}
    for name, value in filtered.items():
        assert torch.equal(value, ours[name]), name
    assert all(torch.equal(state[k], v) for k, v in net.encoder.state_dict().items())


def test_dinov3s_convnext_is_read_in_timms_format_and_metas_files_are_refused_by_what_is_extra(tmp_path: Path) -> None:
    model = timm.create_model("convnext_tiny.dinov3_lvd1689m", pretrained=False)
    randomize(model)
    timm.models.save_for_hf(model, tmp_path / "dino", safe_serialization=True)
    found = read_weights(tmp_path / "dino")
    assert (found.architecture.num_classes, found.license) == (0, "dinov3-license")
    assert found.architecture.spec == VARIANTS["convnext_tiny"]
    theirs = model.state_dict()
    ours = to_state(found.state, found.architecture.spec, "timm")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    # Theirs, under Meta's names, with the norms of all stages beside.
    meta = to_state(found.state, found.architecture.spec, "fair")
    meta |= {"norms.3.weight": torch.ones(768), "norms.3.bias": torch.zeros(768)}
    torch.save(meta, tmp_path / "meta.pth")
    with pytest.raises(ValueError, match=r"extra: norms\.3\.weight"):
        read_weights(tmp_path / "meta.pth")
    assert not any(name.startswith("norms.") for name in checkpoint_filter_fn(meta, model))


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

    content = {"model": Encoder(ATTO).state_dict(), where: Malicious()}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth holds more than tensors \(getattr\) and was not loaded"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_flags_beside_released_weights_are_let_through(tmp_path: Path, zipped: bool) -> None:
    state = Encoder(ATTO).state_dict()
    content = {"model": state, "args": argparse.Namespace(lr=1e-4, model="convnextv2_atto"), "epoch": 799}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "a.pth")
    assert (read.format, read.architecture.spec, read.origin) == ("fair", ATTO, {"file": "a.pth"})
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
    with pytest.raises(ValueError, match="holds no weights"):
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


def test_a_classifier_comes_back_with_its_classes_and_image_settings(tmp_path: Path) -> None:
    model = Classifier(Encoder(ATTO), 3)
    randomize(model)
    image = ImageRecord(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, 64, 64))
    save_classifier(tmp_path / "tuned", model, Weights({}, Architecture(ATTO), image, ("a", "b", "c")))
    read = read_weights(tmp_path / "tuned")
    assert (read.class_names, read.image, read.architecture.num_classes) == (("a", "b", "c"), image, 3)
    back = build_classifier(read)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())


def test_weights_of_images_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    spec = ATTO.model_copy(update={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)})
    image = ImageRecord(mean=(0.5,) * 40, std=(0.5,) * 40, input_size=(40, 8192, 8192))
    state = {f"encoder.{name}": value for name, value in Encoder(spec, 40).state_dict().items()}
    save_weights(tmp_path / "x.safetensors", Weights(state, Architecture(spec, 40), image), "fcmae")
    with pytest.raises(ValueError, match="images of 40 channels and 8192 pixels a side are not read"):
        read_weights(tmp_path / "x.safetensors")


def test_no_export_takes_the_place_of_a_runs_own_model(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    with pytest.raises(ValueError, match="best is where a run keeps its own: give another path"):
        convert(place, tmp_path / "run" / "best", "timm")
    (tmp_path / "config.yaml").write_text("lr: 1\n")  # of a project
    convert(place, tmp_path / "best", "timm")


def test_a_model_beside_somebodys_config_yaml_is_a_model(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "run", variant="convnextv2_atto")[0], tmp_path / "out", "timm")
    (tmp_path / "out" / "config.yaml").write_text("lr: 1\n")
    assert read_weights(tmp_path / "out").architecture.spec == ATTO


def test_a_licence_beside_our_own_file_is_read_from_the_folder_and_the_file(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "run")[0], tmp_path / "out", "timm")
    assert read_weights(tmp_path / "out").license is None
    (tmp_path / "out" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        assert read_weights(path).license == "cc-by-nc-4.0"
    save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "model.safetensors")  # without ours
    assert read_weights(tmp_path / "out" / "model.safetensors").license == "cc-by-nc-4.0"


def test_a_classifier_needs_a_head(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="the weights have no classifier: give those of a fine-tuned model"):
        build_classifier(read_weights(place))


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_file_says_of_itself_survives_every_format(tmp_path: Path, to: str) -> None:
    place, net = write_checkpoint(tmp_path / "run", in_chans=5, variant="convnextv2_atto")
    dest = tmp_path / ("out" if to in ("timm", "transformers") else "out.safetensors")
    text = convert(place, dest, to)
    assert "read the same tensors back" in text
    assert "is as expected" in check(dest)
    read = read_weights(dest)
    assert (read.format, read.architecture.spec, read.architecture.in_chans) == (to, ATTO, 5)
    assert (read.image.mean, read.image.input_size, read.origin["step"]) == ((0.5,) * 5, (5, 64, 64), 3)
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
        state, spec = read_weights(place).state, VARIANTS[variant]
        dense = timm.create_model(variant, num_classes=0)
        dense.stem[0] = torch.nn.Conv2d(3, spec.dims[0], stem_stride, stem_stride)  # timm's of stride 2 is another
        dense.load_state_dict(to_state(state, spec, "timm"))
        features = dense.eval().forward_features(images)
        scale = float(features.abs().max())
        torch.testing.assert_close(theirs.last_hidden_state, features, atol=1e-5 * scale, rtol=1e-5)
        torch.testing.assert_close(theirs.pooler_output, dense(images), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_classifies_as_our_fine_tuned_export(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = Classifier(Encoder(ATTO), 3).eval()
    randomize(model, std=0.1)
    save_classifier(tmp_path / "timm", model, Weights({}, Architecture(ATTO), class_names=("a", "b", "c")))
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


@torch.no_grad()
def test_decoders_of_others_start_from_the_maps_that_load_gives(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp
    from transformers import ConvNextV2Backbone, UperNetConfig, UperNetForSemanticSegmentation

    place, _ = write_checkpoint(tmp_path / "run", variant={"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]})
    for to in ("timm", "transformers"):
        convert(place, tmp_path / to, to)
    images, features = torch.rand(2, 3, 64, 96), fcmae.load(place)
    maps, normalized = features.pyramid(images), features.normalize(images)
    tolerance = {"rtol": 1e-3, "atol": 1e-4}  # the convolutions run over another memory layout

    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, features_only=True)
    torch.testing.assert_close(theirs(normalized), maps, **tolerance)
    for told in ("channels", "reduction"):
        assert getattr(features.feature_info, told)() == getattr(theirs.feature_info, told)()

    unet = smp.Unet(f"tu-local-dir:{tmp_path / 'timm'}", encoder_weights=True, classes=2).eval()
    torch.testing.assert_close(unet.encoder(normalized)[2:], maps, **tolerance)
    assert unet(normalized).shape == (2, 2, 64, 96)

    # Its backbones have a norm of their own behind each stage, which is new.
    backbone = ConvNextV2Backbone.from_pretrained(tmp_path / "transformers", out_indices=(1, 2, 3, 4))
    plain = [F.layer_norm(f.permute(0, 2, 3, 1), f.shape[1:2], eps=1e-6).permute(0, 3, 1, 2) for f in maps]
    torch.testing.assert_close(list(backbone(normalized).feature_maps), plain, **tolerance)
    config = UperNetConfig(backbone_config=backbone.config, num_labels=2, hidden_size=8, auxiliary_in_channels=16)
    net = UperNetForSemanticSegmentation(config).eval()
    net.backbone = backbone
    assert net(normalized).logits.shape == (2, 2, 64, 96)


def test_a_dry_run_prints_the_mapping_and_writes_nothing(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run", variant="convnextv2_atto")
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
    net = build_fcmae(Encoder(ATTO), 16)
    randomize(net, std=0.1)
    image = torch.arange(3 * 64 * 64, dtype=torch.float64).sin().float().view(1, 3, 64, 64)
    with torch.no_grad():
        features = dense_features(net, image).mean((0, 2, 3))
    output = encoder_output(Weights(net.state_dict(), Architecture(ATTO, 3, 1, 16)))
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
        record = json.loads(opened.metadata()["fcmae"])
    save_file(state, file, {"format": "pt", "fcmae": json.dumps(record)})
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since it was written"):
        check(tmp_path / "out")
    del record["sha256"]  # as in exports of before
    save_file(state, file, {"format": "pt", "fcmae": json.dumps(record)})
    with pytest.raises(ValueError, match="the encoder's output is off by"):
        check(tmp_path / "out")


def test_check_says_when_a_file_does_not_tell(tmp_path: Path) -> None:
    save_file(Encoder(ATTO).state_dict(), tmp_path / "a.safetensors")
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
        found = build_encoder(grey)(images).permute(0, 3, 1, 2)
        expected = dense_features(net, images.expand(1, 3, 64, 64))
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
    held = five.state["encoder.downsample_layers.0.0.weight"]
    torch.testing.assert_close(held, stem.data[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert (five.architecture.in_chans, five.image, five.expected_output) == (5, ImageRecord(), ())
    assert not any(name.startswith("decoder.") for name in five.state)
    with pytest.raises(ValueError, match=r"only those of 3 \(RGB\) adapt"):
        adapt_in_chans(five, 4)


def test_pretraining_starts_from_mmearth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=1, dense_stem=True)
    encoder, model = Encoder(spec, 12), build_fcmae(Encoder(spec, 12), 16)
    randomize(encoder)
    theirs = to_state({f"encoder.{name}": value for name, value in encoder.state_dict().items()}, spec, MMEARTH)
    heads = {"decoder_dict.biome.0.norm.weight": torch.ones(3), "proj.bias": torch.ones(3)}
    torch.save({"model": theirs | heads, "args": argparse.Namespace(patch_size=8)}, tmp_path / "checkpoint-199.pth")
    weights = read_weights(tmp_path / "checkpoint-199.pth")
    assert "left out, as they are no part of the network: decoder_dict.biome.0.norm.weight, proj.bias" in caplog.text
    assert "a dense stem, stem stride 1 in mmearth's layout; a fresh decoder" in start_from(model, weights)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in model.encoder.state_dict().items())
    with pytest.raises(ValueError, match="and a plain stem: use --to fcmae"):
        save_weights(tmp_path / "out", weights, "transformers")


def test_channels_adapt_where_a_dense_stem_meets_the_image() -> None:
    spec = ConvNeXtSpec(depths=(1, 1), dims=(4, 6), dense_stem=True)
    encoder = Encoder(spec)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    grey = build_encoder(adapt_in_chans(Weights(state, Architecture(spec)), 1))
    image = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(grey(image), encoder(image.expand(1, 3, 16, 16)), rtol=1e-4, atol=1e-5)


def test_a_decoder_of_gradients_is_said_to_be_left_out(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run", target="hog", variant="convnextv2_atto")
    weights = read_weights(place)
    text = start_from(build_fcmae(Encoder(ATTO), 16), weights)
    assert text.endswith("; a fresh decoder, as model.init has one that was left out, as it predicts hog")
    assert "decoder left out, as it predicts hog" in convert(place, tmp_path / "out.safetensors", "fcmae")


@pytest.mark.parametrize("to", FORMATS)
def test_pretraining_starts_from_every_format(tmp_path: Path, to: str) -> None:
    place, net = write_checkpoint(tmp_path / "run", variant="convnextv2_atto")
    dest = tmp_path / ("out" if to in ("timm", "transformers") else "out.pth")
    convert(place, dest, to)
    model = build_fcmae(Encoder(ATTO), 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = start_from(model, read_weights(dest))
    has_decoder = to in ("fcmae", "minkowski")
    assert text.endswith("; decoder too" if has_decoder else "; a fresh decoder, as model.init has none")
    for name, value in model.state_dict().items():
        taken = has_decoder or name.startswith("encoder.")
        assert torch.equal(value, net.state_dict()[name] if taken else before[name]), name


def test_a_decoder_that_does_not_fit_starts_fresh(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run", variant="convnextv2_atto")
    wider = build_fcmae(Encoder(ATTO), 24)
    assert start_from(wider, read_weights(place)).endswith("model.init has one of depth 1 and width 16 for 3 channels")
    grey = build_fcmae(Encoder(ATTO, in_chans=1), 16)
    text = start_from(grey, read_weights(place))
    assert "its stem adapted from 3 channels to 1; a fresh decoder" in text
    assert torch.equal(grey.encoder.stages[0][0].dwconv.weight, net.encoder.stages[0][0].dwconv.weight)


def test_a_run_is_read_without_a_decoder_that_its_settings_do_not_describe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, net = write_checkpoint(tmp_path / "run", decoder_dim=24)  # but it is one of 16
    weights = read_weights(place)
    assert {f"encoder.{name}" for name in net.encoder.state_dict()} == weights.state.keys()
    assert weights.architecture.decoder_depth == 0
    assert "left out, as its settings do not describe them: decoder.blocks.0.dwconv.bias" in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        VARIANTS["convnextv2_femto"],
        ATTO.model_copy(update={"stem_stride": 2}),
        ConvNeXtSpec(depths=(1, 1), dims=(4, 8)),
    ],
)
def test_starting_from_another_network_is_refused(tmp_path: Path, other: ConvNeXtSpec) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=r"set model\.variant and model\.stem_stride to those of model\.init"):
        start_from(build_fcmae(Encoder(other), 16), read_weights(place))


def test_weights_of_16_bits_are_read_and_kept(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in Encoder(ATTO).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    text = convert(tmp_path / "a.safetensors", tmp_path / "out", "timm")
    assert "they are bfloat16, as in the source" in text
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.parametrize("to", ["timm", "fair"])
def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))

    def broken(path: Path, *_: object) -> None:
        path.write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(files, "write_tensors", broken)
    with pytest.raises(OSError, match="the disk is full"):
        convert(place, tmp_path / ("out" if to == "timm" else "out.safetensors"), to)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_reads_back_otherwise_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    write = files.write_tensors

    def zeroed(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        write(path, tensors | {"decoder.pred.weight": torch.zeros_like(tensors["decoder.pred.weight"])}, metadata)

    monkeypatch.setattr(files, "write_tensors", zeroed)
    with pytest.raises(ValueError, match=r"has changed since it was written"):
        convert(place, tmp_path / "out.safetensors", "fcmae")
    assert not (tmp_path / "out.safetensors").exists()


def test_every_tensor_that_was_written_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    layout = files.to_state

    def zeroed(state: dict[str, torch.Tensor], *rest: Any) -> dict[str, torch.Tensor]:
        found = layout(state, *rest)
        return found | {"decoder.pred.weight": torch.zeros_like(found["decoder.pred.weight"])}

    monkeypatch.setattr(files, "to_state", zeroed)
    with pytest.raises(ValueError, match=r"what was written is not what is read back: decoder\.pred\.weight"):
        convert(place, tmp_path / "out.safetensors", "fcmae")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_damaged_source_is_not_converted(tmp_path: Path) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    convert(place, tmp_path / "a.pth", "fcmae")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["model"]["encoder.stages.1.0.pwconv1.weight"].mul_(1.5)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth has changed since it was written"):
        convert(tmp_path / "a.pth", tmp_path / "out")
    record = json.loads(content["fcmae"])
    torch.save(content | {"fcmae": json.dumps({k: v for k, v in record.items() if k != "sha256"})}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: the encoder's output is off by"):
        convert(tmp_path / "a.pth", tmp_path / "out")
    torch.save({"model": {k: v * torch.nan for k, v in net.state_dict().items()}}, tmp_path / "b.pth")
    with pytest.raises(
        ValueError, match=r"b\.pth: the weights are not finite, .* run that broke down; give an earlier"
    ):
        convert(tmp_path / "b.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    state = Encoder(ATTO).state_dict()
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
    torch.save({"model": Encoder(ATTO).state_dict(), "fcmae": record}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: its record 'fcmae' is not one of ours"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.ones(40, dtype=torch.int64), r"missing: stages\.0\.0\.dwconv\.bias"),
        (1.0, r"missing: stages\.0\.0\.dwconv\.bias"),
        (torch.ones(40).to_sparse(), "is no dense tensor"),
        (torch.ones(1).expand(40), r"claims \(40,\) and stores 4 bytes"),
        (torch.ones(1).expand(60000, 60000), r"claims \(60000, 60000\) and stores 4 bytes"),
        (torch.ones(40, device="meta"), "is a meta tensor, which has no numbers"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path: Path, value: object, why: str) -> None:
    state = Encoder(ATTO).state_dict() | {"stages.0.0.dwconv.bias": value}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=why):
        read_weights(tmp_path / "a.pth")


def test_another_entry_of_a_file_is_read_when_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = Encoder(ATTO).state_dict()
    average = {name: value * 2 for name, value in state.items()}
    torch.save({"model": state, "model_ema": average, "optimizer": {"lr": 1}}, tmp_path / "a.pth")
    with caplog.at_level("WARNING", logger="fcmae"):
        assert torch.equal(read_weights(tmp_path / "a.pth").state["encoder.stages.0.0.norm.weight"], torch.ones(40))
    assert "reading 'model'; it also has 'model_ema'" in caplog.text
    read = read_weights(tmp_path / "a.pth", key="model_ema")
    assert torch.equal(read.state["encoder.stages.0.0.norm.weight"], torch.full((40,), 2.0))
    with pytest.raises(ValueError, match="has no weights under 'ema': --key names one of 'model', 'model_ema'"):
        read_weights(tmp_path / "a.pth", key="ema")
    with pytest.raises(ValueError, match="is a directory, and key 'ema' names what is inside a file"):
        read_weights(tmp_path, key="ema")


def _timm_unfetched(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """timm's pretrained models are untrained ones, which are listed."""
    create, made = timm.create_model, list[nn.Module]()

    def untrained(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        made.append(create(name))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", untrained)
    return made


def test_a_run_starts_from_a_model_of_timms_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _timm_unfetched(monkeypatch)
    weights = read_init("convnextv2_atto.fcmae_ft_in1k", None, None)
    assert weights.origin == {"timm": "convnextv2_atto.fcmae_ft_in1k", "license": "cc-by-nc-4.0"}
    assert weights.are_published and weights.image.size == (224, 224)
    assert weights.image.mean == pytest.approx((0.485, 0.456, 0.406))
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(build_classifier(weights).eval()(images), made[0].eval()(images))


def test_a_model_of_timms_that_cannot_be_a_start_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("convnextv2_ato", "convnextv2_tiny.pth"):
        with pytest.raises(ValueError, match=rf"init = {name} does not exist: .* or the name of a ConvNeXt of timm's"):
            read_init(name, None, None)
    with pytest.raises(ValueError, match="convnextv2_atto is a model of timm's, and key and prefix are for a file"):
        read_init("convnextv2_atto", "model", None)
    made = _timm_unfetched(monkeypatch)
    with pytest.raises(ValueError, match=r"init = resnet18 is no ConvNeXt: give one of timm.list_pretrained"):
        read_init("resnet18", None, None)
    assert not made
    for name, why in (("convnext_atto_ols", "convnext_atto_ols: "), ("convnext_tiny_hnf", "missing: head.norm.weight")):
        with pytest.raises(ValueError, match=why):
            read_init(name, None, None)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"cannot be had \(ConnectionError: no network\): give a path"):
        read_init("convnextv2_atto", None, None)


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
    assert (image.input_size, image.std, image.crop_pct) == ((3, 96, 96), (0.5,) * 3, 1.0)


def test_a_directory_of_timm_s_older_form_is_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))
    known = Weights({}, Architecture(spec), ImageRecord(), class_names=("cat", "dog"))
    save_classifier(tmp_path / "timm", Classifier(Encoder(spec), 2), known)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    told = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 96, 96], "crop_pct": 1.0, "crop_mode": "squash"}
    told |= {"labels": [3, "dog"], "license": "mit"}
    state = load_file(tmp_path / "timm" / "model.safetensors")
    save_file(state, tmp_path / "timm" / "model.safetensors")  # without our record
    for key in ("pretrained_cfg", "label_names"):
        config.pop(key, None)
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config | told))
    found = read_weights(tmp_path / "timm")
    assert (found.image.mean, found.image.size, found.image.crop_pct) == ((0.5,) * 3, (96, 96), 1.0)
    assert (found.class_names, found.license) == (("3", "dog"), "mit")
    assert "its images were made square by squashing them; here and in what is exported their sides" in caplog.text


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
    assert read.image.mean == pytest.approx([0.485, 0.456, 0.406])  # of preprocessor_config.json
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


# Networks of any numbers


CUSTOM = {
    "four stages": ConvNeXtSpec(depths=(1, 2, 1, 1), dims=(4, 6, 8, 10), kernel_size=5),
    "four stages, V1, small stem": ConvNeXtSpec(depths=(1, 1, 2, 1), dims=(4, 4, 6, 8), stem_stride=1, use_grn=False),
    "stem stride 3": ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=3, kernel_size=9),
    "stem stride 2": ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=2),
    "stem stride 8": ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=8),
    "three stages": ConvNeXtSpec(depths=(1, 2, 1), dims=(4, 6, 8)),
    "two stages": ConvNeXtSpec(depths=(2, 1), dims=(4, 6), stem_stride=2, kernel_size=3, use_grn=False),
    "own widths": ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), hidden=((7,), (24,), (5,), (41,))),
}
TIMM_HOLDS = ("four stages", "four stages, V1, small stem", "stem stride 3")
TRANSFORMERS_HOLDS = ("three stages", "stem stride 2", "stem stride 8", "four stages, V1, small stem")


def of_numbers(name: str, out: Path) -> tuple[Path, FCMAE]:
    """A checkpoint of a custom network."""
    spec = CUSTOM[name]
    patch = 2 * spec.total_stride
    variant = spec.model_dump(exclude={"stem_stride"})
    return write_checkpoint(out, variant=variant, stem_stride=spec.stem_stride, mask_patch=patch, image_size=2 * patch)


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("to", ["fcmae", "minkowski", "fair", "timm"])
def test_networks_of_any_numbers_survive_every_format_that_holds_them(tmp_path: Path, to: str, name: str) -> None:
    place, net = of_numbers(name, tmp_path / "run")
    dest = tmp_path / ("out" if to == "timm" else "out.pth")
    assert "read the same tensors back" in convert(place, dest, to)
    assert "is as expected" in check(dest)
    read = read_weights(dest)
    assert (read.format, read.architecture.spec) == (to, CUSTOM[name])
    assert (read.architecture.decoder_dim == 16) == (to in ("fcmae", "minkowski"))
    side = 2 * CUSTOM[name].total_stride
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(build_encoder(read)(images), net.encoder(images))


@pytest.mark.parametrize("name", CUSTOM)
def test_timm_loads_what_it_can_hold_strictly_and_refuses_the_rest_by_its_name(tmp_path: Path, name: str) -> None:
    place, net = of_numbers(name, tmp_path / "run")
    text = convert(place, tmp_path / "out", "timm")
    source = f"local-dir:{tmp_path / 'out'}"
    if name in TIMM_HOLDS:
        assert text.endswith(f'use: timm.create_model("{source}", pretrained=True)')
        model = timm.create_model(source, pretrained=True).eval()
        images = torch.randn(1, 3, 96, 120)
        with torch.no_grad():
            expected = dense_features(net, images)
            found = model.forward_features(images)
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
        # It is loaded strictly: a tensor less is an error.
        file = tmp_path / "out" / "model.safetensors"
        state = load_file(file)
        save_file({k: v.clone() for k, v in state.items() if k != "stages.0.blocks.0.norm.weight"}, file)
        with pytest.raises(RuntimeError, match="Missing key"):
            timm.create_model(source, pretrained=True)
    else:
        assert text.endswith("# timm has no such network")
        with pytest.raises(RuntimeError, match="Unknown model"):
            timm.create_model(source, pretrained=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CUSTOM)
def test_transformers_loads_other_stages_depths_and_widths_but_no_kernels_and_hidden_widths(
    tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers")
    place, net = of_numbers(name, tmp_path / "run")
    if name not in TRANSFORMERS_HOLDS:
        with pytest.raises(
            ValueError, match="transformers' ConvNeXts have 7x7 kernels, 4C hidden channels and a plain stem: use"
        ):
            convert(place, tmp_path / "out", "transformers")
        assert not (tmp_path / "out").exists()
        return
    convert(place, tmp_path / "out", "transformers")
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        found, expected = model.eval()(images).last_hidden_state, dense_features(net, images)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert read_weights(tmp_path / "out").architecture.spec == CUSTOM[name]


def test_a_classifier_of_three_stages_comes_back(tmp_path: Path) -> None:
    spec = CUSTOM["three stages"]
    model = Classifier(Encoder(spec), 3)
    randomize(model)
    save_classifier(tmp_path / "tuned", model, Weights({}, Architecture(spec), class_names=("a", "b", "c")))
    back = build_classifier(read_weights(tmp_path / "tuned"))
    images = torch.randn(2, 3, 32, 48)
    assert back.encoder.spec == spec
    assert torch.equal(back(images), model(images))


def test_a_link_that_leads_nowhere_is_not_written_over(tmp_path: Path) -> None:
    link = tmp_path / "encoder"
    link.symlink_to(tmp_path / "unplugged" / "encoder")
    with pytest.raises(ValueError, match="exists"):
        convert(tmp_path / "run", link)
    assert link.is_symlink() and not link.exists()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"architecture": "convnextv2_atto", "model_args": {"act_layer": "silu"}}, "its activation is silu"),
        ({"architecture": "convnextv2_atto", "model_args": {"norm_eps": 1e-5}}, "its norms add 1e-05"),
        ({"architecture": "convnextv2_atto", "model_args": {"output_stride": 16}}, "its output_stride is 16"),
        ({"architecture": "convnextv2_atto", "model_args": {"patch_size": 8}}, "its patch_size is 8, for which timm"),
        ({"architecture": "convnextv2_atto", "num_classes": 2, "global_pool": "max"}, "its global_pool is max"),
        ({"model_type": "convnextv2", "hidden_act": "relu"}, "its activation is relu"),
        ({"model_type": "convnextv2", "layer_norm_eps": 0.1}, "its layer_norm_eps is 0.1"),
    ],
)
def test_a_directory_of_a_network_that_computes_otherwise_is_refused(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"stem.0.weight": torch.ones(1, 1, 1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=why):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("size", "mean", "is_written"),
    [
        ((64, 64), 0.5, True),
        ((64, 96), 0.5, False),
        ((384, 384), 0.5, False),
        ((64, 64), -600, False),
        ((64, 64), 0.13, False),  # as is measured of 16 bits, which would be divided by 255
    ],
)
def test_transformers_is_told_how_images_are_read_where_it_can_read_them_so(
    tmp_path: Path, size: tuple[int, int], mean: float, is_written: bool
) -> None:
    model = Classifier(Encoder(ATTO), 2)
    image = ImageRecord(mean=(mean,) * 3, std=(0.5,) * 3, input_size=(3, *size), crop_pct=0.9)
    save_classifier(tmp_path / "tuned", model, Weights({}, Architecture(ATTO), image, ("a", "b")))
    said = convert(tmp_path / "tuned", tmp_path / "out", "transformers")
    assert (tmp_path / "out" / "preprocessor_config.json").exists() == is_written
    assert ("no preprocessor_config.json" in said) != is_written


def test_what_a_file_says_of_itself_moves_no_terminal(tmp_path: Path) -> None:
    place, _ = write_checkpoint(tmp_path / "run")
    weights = read_weights(place)
    save_weights(tmp_path / "x.safetensors", replace(weights, origin={"note": "\x1b]0;title\x07"}), "fcmae")
    for dest in (None, tmp_path / "out"):
        assert "\x1b" not in convert(tmp_path / "x.safetensors", dest, "timm")


def test_a_dry_run_names_the_tensors_of_other_networks_too(tmp_path: Path) -> None:
    spec = RoadmapSpec(depths=(1, 1), dims=(8, 16))
    encoder = make_encoder(spec)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    save_weights(tmp_path / "x.safetensors", Weights(state, Architecture(spec)), "fcmae")
    lines = [line for line in convert(tmp_path / "x.safetensors", None, "timm").splitlines() if " -> " in line]
    assert lines and not any(line.startswith("identity") for line in lines)
