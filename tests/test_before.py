"""What version 0.1.0 wrote is still read: its runs, their checkpoints of format 1, and its exports.

tests/data/before holds one of each, of the smallest network; its settings call it convnextv2_atto, which is made to
mean it here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models import ConvNeXt
from torch import Tensor

from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.heads import Classifier
from fcmae.masked import FCMAE, build_fcmae
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.options import read
from fcmae.pretraining import build_optimizer as pretraining_optimizer
from fcmae.starting import build_optimizer as finetuning_optimizer
from fcmae.training import checkpoint
from fcmae.weights.convert import build_classifier, check, convert
from fcmae.weights.files import read_weights
from fcmae.weights.formats import OLD, rename

BEFORE = Path(__file__).parent / "data" / "before"
PRETRAINING = BEFORE / "pretrain" / "checkpoints" / "step-00000006"
FINETUNING = BEFORE / "finetune" / "checkpoints" / "step-00000008"
SPEC = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
SMALL_STEM = SPEC.model_copy(update={"stem_stride": 1})

EXPORTS = {
    "fcmae.safetensors": OLD,
    "minkowski.pth": "minkowski",
    "fair.safetensors": "fair",
    "timm": "timm",
    "transformers": "transformers",
}


@pytest.fixture(autouse=True)
def _named_atto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "convnextv2_atto", SPEC)


def ours(name: str) -> str:
    """Today's name of a parameter of the pretraining of before."""
    if name.startswith("encoder."):
        return name
    number, _, rest = name.removeprefix("decoder.").partition(".")
    return f"decoder.blocks.{number}.{rest}" if name.startswith("decoder.") else f"decoder.{name}"


@pytest.fixture
def stored() -> dict[str, Tensor]:
    """The tensors of the pretraining checkpoint, under today's names."""
    return {ours(name): value for name, value in load_file(PRETRAINING / "model.safetensors").items()}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_are_read_and_give_the_output_that_their_writer_saw(name: str, stored: dict[str, Tensor]) -> None:
    weights = read_weights(BEFORE / name)
    assert weights.format == EXPORTS[name]
    assert weights.architecture.spec == SMALL_STEM
    assert (weights.origin["version"], weights.origin["step"]) == ("0.1.0", 6)
    assert weights.image.input_size == (3, 16, 16)
    assert len(weights.expected_output) == 8
    assert "the encoder's output is as expected" in check(BEFORE / name)
    has_decoder = weights.format in (OLD, "minkowski")
    assert weights.state.keys() == {key for key in stored if has_decoder or key.startswith("encoder.")}
    assert all(torch.equal(value, stored[key]) for key, value in weights.state.items())


@pytest.mark.parametrize("source", [BEFORE / "pretrain", PRETRAINING], ids=["run", "checkpoint"])
def test_a_pretraining_is_read(source: Path, stored: dict[str, Tensor], tmp_path: Path) -> None:
    weights = read_weights(source)
    assert (weights.format, weights.architecture.spec) == (OLD, SMALL_STEM)
    assert (weights.architecture.decoder_depth, weights.architecture.decoder_dim) == (1, 8)
    assert weights.origin["version"] == "0.1.0"
    assert weights.state.keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in weights.state.items())
    assert "read the same tensors back" in convert(source, tmp_path / "new.safetensors", "fcmae")
    again = read_weights(tmp_path / "new.safetensors")
    assert again.format == "fcmae"
    assert again.expected_output == pytest.approx(read_weights(BEFORE / "fcmae.safetensors").expected_output, abs=1e-5)


def test_a_fine_tuned_model_is_read_and_classifies_as_timm_does() -> None:
    weights = read_weights(BEFORE / "finetune")
    assert (weights.format, weights.class_names, weights.architecture.spec) == ("timm", ("blue", "green"), SPEC)
    assert "as expected" in check(BEFORE / "finetune" / "best")
    model, theirs = build_classifier(weights), of_timm(load_file(BEFORE / "finetune" / "best" / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=1e-5)


def of_timm(state: dict[str, Tensor]) -> ConvNeXt:
    """timm's classifier with the tensors of a file, under their names in it."""
    model = ConvNeXt(depths=SPEC.depths, dims=SPEC.dims, num_classes=2, conv_mlp=True, use_grn=True, ls_init_value=None)
    model.load_state_dict(state)
    return model.eval()


def test_the_settings_of_before_are_read() -> None:
    pretraining = read(PretrainConfig, BEFORE / "pretrain" / "config.yaml")
    assert pretraining.model.spec == SMALL_STEM
    finetuning = read(FinetuneConfig, BEFORE / "finetune" / "config.yaml")
    assert finetuning.model.spec == SPEC


def test_a_pretraining_of_before_goes_on_with_its_weights_and_moments(stored: dict[str, Tensor]) -> None:
    meta = checkpoint.read_meta(PRETRAINING)
    assert (meta.format, meta.kind, meta.step) == (1, "pretrain", 6)
    model: FCMAE = build_fcmae(Encoder(SMALL_STEM), 8)
    cfg = PretrainConfig.model_validate(meta.config)
    optimizer = pretraining_optimizer(cfg, model)
    from_format_1 = partial(rename, to=OLD)
    checkpoint.restore(PRETRAINING, model, optimizer, from_format_1)
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    moments = load_file(PRETRAINING / "optimizer.safetensors")
    found = checkpoint.optimizer_state(optimizer, model)
    assert len(found) == len(moments) == 3 * len(stored)
    for flat, value in moments.items():
        name, moment = flat.rsplit("/", 1)
        assert torch.equal(found[f"{ours(name)}/{moment}"], value), flat
    # And on it goes.
    pred, _ = model(torch.randn(1, 3, 16, 16), torch.tensor([[[True, False], [True, True]]]))
    pred.square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"data\.path no longer gives the images of"):
        checkpoint.check_origin(PRETRAINING, "pretrain", "others")


def test_a_fine_tuning_of_before_goes_on_with_its_weights_moments_and_average() -> None:
    meta = checkpoint.read_meta(FINETUNING)
    assert (meta.format, meta.kind, meta.step) == (1, "finetune", 8)
    model = Classifier(Encoder(SPEC), 2)
    optimizer = finetuning_optimizer(FinetuneConfig.model_validate(meta.config), model)
    from_format_1 = partial(rename, to="timm")
    checkpoint.restore(FINETUNING, model, optimizer, from_format_1)
    average = Classifier(Encoder(SPEC), 2)
    average.load_state_dict(checkpoint.read_state(FINETUNING, "ema", average, from_format_1))
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for network, name in ((model, "model"), (average, "ema")):
        theirs = of_timm(load_file(FINETUNING / f"{name}.safetensors"))
        outputs.append(theirs(images))
        torch.testing.assert_close(network(images), outputs[-1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(*outputs)
    # Moments have their parameter's shape, which of 1x1 convolutions was another.
    moments = load_file(FINETUNING / "optimizer.safetensors")
    found = checkpoint.optimizer_state(optimizer, model)
    assert len(found) == len(moments)
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            value = found[f"{name}/{moment}"]
            assert value.shape == parameter.shape
            assert torch.equal(value.flatten(), moments[f"{rename(name, 'timm')}/{moment}"].flatten())
        assert found[f"{name}/step"].item() == 8
    model(images).square().mean().backward()
    optimizer.step()
