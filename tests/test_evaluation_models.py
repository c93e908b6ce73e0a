from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_weights_convert import write_checkpoint
from torch import nn

from fcmae.evaluation.models import choose_device, load_backbone
from fcmae.weights.convert import save_dense
from fcmae.weights.files import Weights
from fcmae.weights.formats import Architecture


def test_a_checkpoint_is_read_as_it_was_trained(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path, stem_stride=2)
    backbone = load_backbone(str(checkpoint))
    assert backbone.architecture is not None
    assert (backbone.architecture.variant, backbone.architecture.stem_stride) == ("convnextv2_atto", 2)
    assert (backbone.image_size, backbone.in_chans, backbone.crop_pct) == ((64, 64), 3, 1.0)
    assert backbone.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert backbone.origin["step"] == 3
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_classifier_loses_its_head_and_keeps_its_image_settings(tmp_path: Path) -> None:
    image = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 96], "crop_pct": 0.9}
    model = timm.create_model("convnextv2_atto", num_classes=3)
    save_dense(tmp_path / "tuned", model, Weights({}, Architecture("convnextv2_atto"), image, ("a", "b", "c")))
    backbone = load_backbone(str(tmp_path / "tuned"))
    assert (backbone.image_size, backbone.crop_pct) == ((64, 96), 0.9)
    assert backbone.normalize.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert backbone.model(torch.zeros(1, 3, 64, 96)).shape == (1, 320)


def test_untrained_networks_have_the_same_shapes_and_are_the_same_each_time(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path, stem_stride=2)
    trained = load_backbone(str(checkpoint)).model.state_dict()
    state = torch.get_rng_state()
    first, second = (load_backbone(f"random:{checkpoint}").model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in trained.items()}
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    weight = "stages.0.blocks.0.conv_dw.weight"
    assert not torch.equal(first[weight], trained[weight])
    assert float(first[weight].std()) == pytest.approx(0.02, rel=0.1)


def test_any_network_of_timm_is_taken_at_other_sizes() -> None:
    backbone = load_backbone("random:vit_tiny_patch16_224", (64, 32))
    assert backbone.architecture is None
    assert backbone.image_size == (64, 32)
    assert backbone.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # that network's own
    grey = load_backbone("random:convnextv2_atto", (64, 64), in_chans=1)
    assert (grey.in_chans, grey.normalize.mean.tolist()) == (1, [[[pytest.approx(0.449)]]])
    assert grey.architecture == Architecture("convnextv2_atto", 1, final_norm=True)


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
    assert load_backbone(str(checkpoint), in_chans=1).in_chans == 1
    with pytest.raises(ValueError, match=r"in_chans = 3, but .* of 1 channels"):
        load_backbone(str(checkpoint), in_chans=3)


def test_weights_of_many_channels_must_say_their_statistics(tmp_path: Path) -> None:
    model = timm.create_model("convnextv2_atto", in_chans=5, num_classes=0)
    save_dense(tmp_path / "bands", model, Weights({}, Architecture("convnextv2_atto", 5)))
    with pytest.raises(ValueError, match="does not say the mean and std of its 5 channels"):
        load_backbone(str(tmp_path / "bands"))


def test_the_cpu_is_taken_when_asked_for() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    expected = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert choose_device("auto") == expected
