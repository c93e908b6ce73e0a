from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_weights_convert import write_checkpoint
from timm.models import ConvNeXt
from torch import nn

from fcmae.data.augment import Reading, seeded
from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.evaluation.features import extract
from fcmae.evaluation.models import Control, _as_ours, choose_device, load_backbone, load_backbones, stage_maps
from fcmae.heads import Classifier
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.weights.convert import save_classifier
from fcmae.weights.files import save_weights
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

ATTO = VARIANTS["convnextv2_atto"]


def test_a_checkpoint_is_read_as_it_was_trained(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path, variant="convnextv2_atto", stem_stride=2)
    backbone = load_backbone(str(checkpoint))
    assert isinstance(backbone.model, Encoder)
    assert backbone.model.spec == ATTO.model_copy(update={"stem_stride": 2})
    assert backbone.kind == "convnextv2_atto, stem stride 2"
    reading = backbone.reading
    assert (reading.image_size, reading.in_chans, reading.crop_pct) == ((64, 64), 3, 1.0)
    assert reading.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert backbone.origin["step"] == 3
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_classifier_loses_its_head_and_keeps_its_image_settings(tmp_path: Path) -> None:
    image = ImageRecord(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 64, 96), crop_pct=0.9)
    model = Classifier(Encoder(ATTO), 3)
    save_classifier(tmp_path / "tuned", model, Weights({}, Architecture(ATTO), image, ("a", "b", "c")))
    backbone = load_backbone(str(tmp_path / "tuned"))
    assert (backbone.reading.image_size, backbone.reading.crop_pct) == ((64, 96), 0.9)
    assert backbone.reading.normalize.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(backbone.model(images), model.encoder(images))  # (1, 2, 3, 320)


def test_untrained_networks_have_the_same_shapes_and_are_the_same_each_time(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path, stem_stride=2)
    trained = load_backbone(str(checkpoint)).model.state_dict()
    state = torch.get_rng_state()
    first, second = (load_backbone(f"random:{checkpoint}").model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in trained.items()}
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    weight = "stages.0.0.dwconv.weight"
    assert not torch.equal(first[weight], trained[weight])
    assert float(first[weight].std()) == pytest.approx(0.02, rel=0.1)


def test_any_network_of_timm_is_taken_at_other_sizes() -> None:
    backbone = load_backbone("random:vit_tiny_patch16_224", (64, 32))
    assert not isinstance(backbone.model, Encoder)
    assert backbone.kind == "vit_tiny_patch16_224"
    assert backbone.reading.image_size == (64, 32)
    assert backbone.reading.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # that network's own
    grey = load_backbone("random:convnextv2_atto", (64, 64), in_chans=1)
    assert (grey.reading.in_chans, grey.reading.normalize.mean.tolist()) == (1, [[[pytest.approx(0.449)]]])


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_tiny"])
def test_timms_convnexts_are_our_encoders_with_the_same_features(name: str) -> None:
    backbone = load_backbone(f"random:{name}", (64, 64))
    assert isinstance(backbone.model, Encoder)
    assert (backbone.model.spec, backbone.kind) == (VARIANTS[name], name)
    with seeded([0]):
        theirs = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, norm=False, intermediates_only=True)
        for found, of_timm in zip(stage_maps(backbone.model, images), expected, strict=True):
            torch.testing.assert_close(found, of_timm, atol=1e-5 * float(of_timm.abs().max()), rtol=1e-4)


def test_a_convnext_of_timms_that_is_none_of_ours_stays_as_it_is() -> None:
    backbone = load_backbone("random:convnext_atto_ols", (64, 64))  # its stem's convolutions overlap
    assert isinstance(backbone.model, ConvNeXt)
    assert backbone.kind == "convnext_atto_ols"
    assert [found.shape[1] for found in stage_maps(backbone.model, torch.zeros(1, 3, 64, 64))] == [40, 80, 160, 320]


def test_three_stages_give_three_maps(tmp_path: Path) -> None:
    spec = ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 6, 8), stem_stride=2)
    encoder = Encoder(spec)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    save_weights(tmp_path / "a.safetensors", Weights(state, Architecture(spec)), "fcmae")
    backbone = load_backbone(str(tmp_path / "a.safetensors"), (32, 48))
    maps = stage_maps(backbone.model, torch.zeros(1, 3, 32, 48))
    assert [tuple(found.shape[1:]) for found in maps] == [(4, 16, 24), (6, 8, 12), (8, 4, 6)]
    assert backbone.kind == "ConvNeXt V2 of depths 1-1-1, dims 4-6-8, stem stride 2"


def test_a_timm_name_asks_for_pretrained_weights_and_random_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def record(name: str, pretrained: bool, **options: Any) -> Any:
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", record)
    assert load_backbone("convnextv2_atto").origin["timm"].startswith("convnextv2_atto.")
    assert "timm" not in load_backbone("random:convnextv2_atto").origin
    assert asked == [True, False]


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"cannot be had \(ConnectionError: no network\): give a path, or random:"):
        load_backbone("convnextv2_atto")
    with pytest.raises(ValueError, match=r"cannot be built \(ConnectionError: no network\): give another"):
        load_backbone("random:convnextv2_atto")


def test_networks_without_features_of_stages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Identity()
    model.pretrained_cfg = timm.create_model("convnextv2_atto").pretrained_cfg
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    with pytest.raises(ValueError, match="timm does not give the features of its stages"):
        load_backbone("random:convnextv2_atto")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing", {}, "'nothing' is neither a path nor a model of timm's: give a run"),
        ("random:nothing", {}, "'random:nothing' is neither"),
        (
            "random:convnextv2_atto",
            {"image_size": (16, 16)},
            "cannot take images of 16x16 pixels .*: give another image",
        ),
        ("random:convnextv2_atto", {"in_chans": 4}, "in_chans = 4: timm's models know"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(source, **options)


def test_channels_of_weights_cannot_be_changed(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path, in_chans=1)
    assert load_backbone(str(checkpoint), in_chans=1).reading.in_chans == 1
    with pytest.raises(ValueError, match=r"in_chans = 3, but .* of 1 channels"):
        load_backbone(str(checkpoint), in_chans=3)


def test_weights_of_many_channels_must_say_their_statistics(tmp_path: Path) -> None:
    save_classifier(tmp_path / "bands", Classifier(Encoder(ATTO, 5), 2), Weights({}, Architecture(ATTO, 5)))
    with pytest.raises(ValueError, match="does not say the mean and std of its 5 channels"):
        load_backbone(str(tmp_path / "bands"))


def test_which_weights_of_a_file_are_meant_is_passed_on_and_is_not_for_a_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, net = write_checkpoint(tmp_path / "run")
    state = {f"student.{name}": value for name, value in net.encoder.state_dict().items()}
    torch.save(
        {"both": state | {name.replace("student", "teacher"): -v for name, v in state.items()}}, tmp_path / "a.pth"
    )
    for source in (tmp_path / "a.pth", place):
        model = load_backbone(str(source), key="both", prefix="student").model
        assert all(torch.equal(value, net.encoder.state_dict()[name]) for name, value in model.state_dict().items())
    assert f"{place} is a directory: key and prefix are not for it" in caplog.text


def test_the_cpu_is_taken_when_asked_for() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    expected = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert choose_device("auto") == expected


def test_a_home_that_is_not_there_is_no_model() -> None:
    with pytest.raises(ValueError, match="'~nobody-here/run' is neither a path"):
        load_backbone("~nobody-here/run")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Four images of 12 x 16 pixels: noise, all black, all white, and one colour."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    pixels = rng.integers(0, 256, (4, 12, 16, 3), dtype=np.uint8)
    pixels[1], pixels[2], pixels[3] = 0, 255, (10, 128, 250)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{number}.png")
    return find_images([str(root)])


def pixels_of(photos: Images, mode: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = [np.asarray(Image.open(photos.name(i)).convert(mode), np.float64) / 255 for i in range(len(photos))]
    return np.stack(found).reshape(len(found), 12, 16, -1)


def features_of(name: str, photos: Images, in_chans: int = 3) -> np.ndarray[Any, np.dtype[np.float32]]:
    backbone = load_backbone(name, (12, 16), in_chans)
    with TemporaryDirectory() as folder:
        found = extract(backbone, photos, None, device=torch.device("cpu"), directory=Path(folder), num_workers=0)
        assert list(found.stages) == [1] and found.positions.tolist() == [0, 1, 2, 3]
        return np.array(found.stages[1])


def test_pixels_are_means_of_equal_parts_of_the_image(photos: Images) -> None:
    pixels = pixels_of(photos, "RGB")
    halves = pixels.reshape(4, 2, 6, 2, 8, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(4, 12)
    np.testing.assert_allclose(features_of("pixels:2", photos), halves, atol=1e-6)
    np.testing.assert_allclose(features_of("pixels:1", photos), pixels.mean((1, 2)), atol=1e-6)
    grey = pixels_of(photos, "L").mean((1, 2))
    np.testing.assert_allclose(features_of("pixels:1", photos, 1), grey, atol=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 8, 16])
def test_small_histograms_count_colours_and_large_ones_channels(photos: Images, bins: int) -> None:
    pixels, span = pixels_of(photos, "RGB").reshape(4, -1, 3), [(0, 1)] * 3
    joint = [np.histogramdd(image[:, ::-1], bins, span)[0].ravel() / len(image) for image in pixels]
    np.testing.assert_allclose(features_of(f"histogram:{bins}", photos), joint, atol=1e-6)
    many = [np.histogram(image[:, c], 19, (0, 1))[0] / len(image) for image in pixels for c in range(3)]
    np.testing.assert_allclose(features_of("histogram:19", photos), np.reshape(many, (4, 57)), atol=1e-6)


def test_a_histogram_refuses_values_that_are_no_shares_of_a_range() -> None:
    with pytest.raises(
        ValueError, match=r"counts values from 0 to 1, .* reach from -1000 to 500: .* or take pixels:32"
    ):
        Control("histogram:8")(torch.tensor([-1000.0, 500.0]).view(1, 1, 1, 2))


def test_a_histogram_counts_the_range_that_deep_images_have() -> None:
    scanner = Control("histogram:4", [-250.0], [500.0])  # from -1250 to 750
    values = torch.tensor([-2000.0, -1249, -751, -749, -251, -249, 249, 251, 5000]).view(1, 1, 1, 9)
    assert (scanner(values) * 9).tolist() == [[3, 2, 2, 2]]
    twelve_bits = torch.arange(4096).view(1, 1, 64, 64) / 65535
    assert Control("histogram:8", [1 / 32], [1 / 64])(twelve_bits).count_nonzero() == 8
    for std in (0.23, 0.5):
        usual = Control("histogram:2", [0.5], [std])
        assert (usual.low, usual.high) == (0, 1)
    assert usual(torch.tensor([0.0, 0.1, 0.49, 0.51]).view(1, 1, 1, 4)).tolist() == [[0.75, 0.25]]


def test_a_control_beside_a_network_knows_the_range_of_its_images() -> None:
    like = Reading(1, (16, 16), 1.0, (-250.0,), (500.0,))
    assert load_backbone("histogram:8", like=like).model.high == 750


def test_controls_see_what_the_first_network_sees(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path)
    control, network = load_backbones(["pixels:8", str(checkpoint)], Images.of_files([]))
    assert control.name == control.kind == "pixels:8" and isinstance(control.model, Control)
    for name in ("in_chans", "image_size", "crop_pct"):
        assert getattr(control.reading, name) == getattr(network.reading, name)
    assert control.reading.normalize.std.flatten().tolist() == [1, 1, 1]
    # What is missing is no feature of the control alone.
    assert tuple(control.reading.filling) == tuple(network.reading.filling)


def test_controls_alone_see_the_images_as_they_are(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 900, (20, 20, 5), np.uint16)  # dark, as 12 bits in 16 are
    np.save(tmp_path / "dark.npy", bands)
    images = Images.of_files([str(tmp_path / "dark.npy")])
    histogram, pixels = load_backbones(["histogram:8", "pixels:1"], images, image_size=(20, 20))
    values = torch.from_numpy(bands.astype(np.float32) / 65535).permute(2, 0, 1)[None]
    shares = histogram.model(values).view(5, 8)
    assert histogram.reading.in_chans == pixels.reading.in_chans == 5
    assert (shares > 0).all() and shares.max() < 0.5
    torch.testing.assert_close(pixels.model(values)[0], values.mean((0, 2, 3)))


@pytest.mark.parametrize("changed", [{"act_layer": "gelu_tanh"}, {"norm_eps": 1e-5}])
def test_a_convnext_that_computes_otherwise_on_tensors_of_the_same_names_stays_timms(changed: dict[str, Any]) -> None:
    model = timm.create_model("convnextv2_atto", num_classes=0, **changed)
    assert _as_ours(model) is model
