"""Pruning: what stays, what makes up for the rest, and that every command takes what is left."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import runs
import timm
import torch
from conftest import randomize
from runs import write_images
from torch import Tensor

import fcmae
from fcmae import cli
from fcmae.heads import Classifier
from fcmae.masked import build_fcmae
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import Block
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.pruning import By, How, Measured, channel_scores, choose, cut, keep_best, measure, multiply_adds, uniformly
from fcmae.weights.convert import build_classifier, build_encoder, save_classifier
from fcmae.weights.files import read_weights, save_weights
from fcmae.weights.formats import Architecture, to_state
from fcmae.weights.record import ImageRecord, Weights

pytestmark = pytest.mark.usefixtures("one_thread", "forgotten", "undrawn")
SPEC = ConvNeXtSpec(depths=(2, 1, 2), dims=(4, 6, 8), stem_stride=2)
V1 = SPEC.model_copy(update={"use_grn": False})
IMAGE = ImageRecord(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)


def classifier(spec: ConvNeXtSpec = SPEC, num_classes: int = 2) -> Classifier:
    model = Classifier(Encoder(spec), num_classes).eval()
    randomize(model)
    return model


def weights_of(model: Classifier, **more: Any) -> Weights:
    architecture = Architecture(model.encoder.spec, final_norm=True, num_classes=model.head.out_features)
    return Weights(dict(model.state_dict()), architecture, **more)


def blocks(encoder: Encoder) -> list[Block]:
    return [block for stage in encoder.stages for block in cast("Any", stage)]


@torch.no_grad()
def kill(encoder: Encoder, share: float) -> dict[str, Tensor]:
    """Have a share of each block's hidden channels, drawn at random, say nothing but GRN's beta; those that live."""
    lives = {}
    for name, block in zip(names(encoder.spec), blocks(encoder), strict=True):
        order = torch.randperm(block.pwconv1.out_features)
        dead = order[: int(share * len(order))]
        block.pwconv1.weight[dead], block.pwconv1.bias[dead] = 0, 0
        lives[name] = order[len(dead) :].sort().values
    return lives


def names(spec: ConvNeXtSpec) -> list[str]:
    return [f"stages.{i}.{j}" for i, depth in enumerate(spec.depths) for j in range(depth)]


def widths(spec: ConvNeXtSpec) -> dict[str, int]:
    return dict(zip(names(spec), (width for stage in spec.hidden_widths for width in stage), strict=True))


def images(num: int, seed: int, size: int = 16) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


# What is measured


@pytest.mark.parametrize("spec", [SPEC, V1])
def test_what_is_measured_is_what_the_blocks_do_image_by_image(spec: ConvNeXtSpec) -> None:
    encoder, seen = classifier(spec).encoder.double().requires_grad_(False), images(3, 1).double()
    found = measure(encoder, [seen[:2], seen[:0], seen[2:]])
    here: list[Tensor] = []
    for block in blocks(encoder):
        block.register_forward_hook(lambda block, given, out: here.extend((given[0], out)))
    expanded = []
    for image in seen:  # one image at a time
        here.clear()
        encoder(image[None])
        expanded.append(list(here))
    for number, (name, block) in enumerate(zip(names(spec), blocks(encoder), strict=True)):
        values, norms, shares = [], [], []
        for here in expanded:
            x, out = here[2 * number : 2 * number + 2]
            h = torch.nn.Conv2d.forward(block.dwconv, x.movedim(-1, 1)).movedim(1, -1)
            h = torch.nn.functional.gelu(block.pwconv1(block.norm(h)))[0]
            g = h.flatten(0, 1).norm(dim=0)
            if block.grn is not None:
                h = h * (1 + block.grn.gamma.flatten() * g / g.mean()) + block.grn.beta.flatten()
                norms.append(g / g.mean())
            values.append(h.flatten(0, 1))
            shares.append((out - x).norm() / out.norm())
        together = torch.cat(values)
        torch.testing.assert_close(found[name].mean, together.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[name].std, together.std(0, correction=0), atol=1e-5, rtol=1e-5)
        if norms:
            torch.testing.assert_close(found[name].norms, torch.stack(norms).mean(0), atol=1e-5, rtol=1e-5)
        else:
            assert (found[name].norms == 1).all()
        assert found[name].share == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="none of the images can be read"):
        measure(encoder, [seen[:0]])


# What stays


def test_the_best_of_each_group_or_of_all_together_stay() -> None:
    groups = [torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([9.0, 8.0]), torch.tensor([0.1])]
    assert [part.tolist() for part in keep_best(groups, 0.5, "uniform")] == [[0, 2], [0], [0]]
    # Of 7, round(3.5) = 4: 9, 8, 3, and the last group's only one.
    assert [part.tolist() for part in keep_best(groups, 0.5, "global")] == [[0], [0, 1], [0]]
    for how in ("uniform", "global"):
        assert [len(part) for part in keep_best(groups, 1e-6, cast("How", how))] == [1, 1, 1]


@pytest.mark.parametrize("spec", [SPEC, V1])
@torch.no_grad()
def test_scores_of_channels_are_as_defined_whatever_the_width(spec: ConvNeXtSpec) -> None:
    """By activation, what a channel adds to the output as a share of it, measured by taking its variation away."""
    encoder, seen = classifier(spec).encoder, images(8, 1)
    found = measure(encoder, [seen])
    for name, block in zip(names(spec), blocks(encoder), strict=True):
        columns = block.pwconv2.weight if block.gamma is None else block.pwconv2.weight * block.gamma[:, None]
        output = found[name].output_rms * torch.ones(len(columns))  # as if all channels had it
        changes = found[name].std.float()[:, None] * columns.T
        expected = (changes.norm(dim=1) / output.norm()).double()
        torch.testing.assert_close(channel_scores(block, found[name], "activation"), expected, rtol=1e-5, atol=0)
        products = block.pwconv1.weight.norm(dim=1) * columns.norm(dim=0)
        expected = products.double() / products.double().mean()
        torch.testing.assert_close(channel_scores(block, found[name], "norm"), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_as_much_of_the_output_is_as_much_in_stages_of_any_width() -> None:
    scores = []
    for dim in (4, 64):
        block = Block(dim)
        block.pwconv2.weight.zero_()
        block.pwconv2.weight[:, 0] = 3.0  # all channels of an output whose values are 10 change by 3
        measured = Measured(torch.zeros(4 * dim), torch.ones(4 * dim), torch.ones(4 * dim), 10.0, 0.5)
        scores.append(float(channel_scores(block, measured, "activation")[0]))
    assert scores == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("spec", [SPEC, V1])
@pytest.mark.parametrize("how", ["uniform", "global"])
@pytest.mark.parametrize("by", ["norm", "activation"])
def test_removing_dead_channels_leaves_the_function_as_it_was(spec: ConvNeXtSpec, how: How, by: By) -> None:
    model = classifier(spec)
    lives = kill(model.encoder, 0.5)
    weights = weights_of(model)
    measured = measure(model.encoder, [images(4, 1)])
    kept = choose(model.encoder, measured, 0.5, "hidden", how, by)
    assert {name: channels.tolist() for name, channels in kept.items()} == {n: c.tolist() for n, c in lives.items()}
    pruned = cut(weights, kept, measured)
    assert pruned.architecture.spec.hidden_widths == ((8, 8), (12,), (16, 16))
    others = images(5, 2, 24)
    with torch.no_grad():
        expected, found = model(others), build_classifier(pruned)(others)
        bare = build_classifier(cut(weights, kept))(others)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if spec.use_grn:  # V1's dead channels say nothing at all
        assert (bare - expected).abs().max() > 0.01


def test_what_makes_up_for_channels_that_live_brings_the_features_nearer() -> None:
    model, seen, others = classifier(), images(16, 1), images(16, 2)
    measured = measure(model.encoder, [seen])
    kept = choose(model.encoder, measured, 0.5, "hidden", "uniform", "activation")
    weights = weights_of(model)
    with torch.no_grad():
        expected = model.encoder(others)
        bare, made_up = (
            (build_encoder(w)(others) - expected).norm() for w in (cut(weights, kept), cut(weights, kept, measured))
        )
    assert made_up < 0.8 * bare


def test_a_channel_that_is_always_the_same_is_the_first_to_go_and_nothing_is_lost() -> None:
    model = classifier(V1)
    with torch.no_grad():
        for block in blocks(model.encoder):
            block.pwconv1.weight[3], block.pwconv1.bias[3] = 0, 5
    measured = measure(model.encoder, [images(2, 1)])
    kept = choose(model.encoder, measured, 0.95, "hidden", "uniform", "activation")  # 15 of 16, 23 of 24, 30 of 32
    assert not any(3 in channels for channels in kept.values())
    kept = {name: torch.tensor([c for c in range(width) if c != 3]) for name, width in widths(V1).items()}
    with torch.no_grad():
        found, expected = (m(images(2, 2)) for m in (build_classifier(cut(weights_of(model), kept, measured)), model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_blocks_go_by_what_they_add_and_each_stage_keeps_one() -> None:
    model = classifier()
    with torch.no_grad():
        for number in (1, 2, 4):  # the second of stage 0, the only one of stage 1, the second of stage 2
            blocks(model.encoder)[number].pwconv2.weight.mul_(1e-6)
            blocks(model.encoder)[number].pwconv2.bias.zero_()
            blocks(model.encoder)[number].grn.beta.zero_()  # type: ignore[union-attr]
    measured = measure(model.encoder, [images(2, 1)])
    for how in ("uniform", "global"):
        kept = choose(model.encoder, measured, 0.6, "blocks", cast("How", how), "activation")
        assert list(kept) == ["stages.0.0", "stages.1.0", "stages.2.0"]
    pruned = cut(weights_of(model), kept, measured)
    assert pruned.architecture.spec == ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 6, 8), stem_stride=2)
    assert pruned.architecture.spec == uniformly(SPEC, 0.6, "blocks")
    with torch.no_grad():
        torch.testing.assert_close(build_classifier(pruned)(images(2, 3)), model(images(2, 3)), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no LayerScale"):
        choose(model.encoder, measured, 0.5, "blocks", "uniform", "norm")


def test_blocks_of_v1_go_by_layer_scale() -> None:
    encoder = classifier(V1).encoder
    with torch.no_grad():
        for block, size in zip(blocks(encoder), (1, -2, 1, 3, -4), strict=True):
            block.gamma.fill_(size)  # type: ignore[union-attr]
    measured = measure(encoder, [images(1, 1)])
    assert list(choose(encoder, measured, 0.5, "blocks", "uniform", "norm")) == [
        f"stages.{n}" for n in ("0.1", "1.0", "2.1")
    ]


def test_the_blocks_that_stay_keep_their_widths_and_their_order() -> None:
    spec = ConvNeXtSpec(depths=(3, 1), dims=(4, 6), hidden=((5, 7, 9), (11,)))
    model = classifier(spec)
    kept = {"stages.0.0": torch.arange(5), "stages.0.2": torch.tensor([0, 8]), "stages.1.0": torch.arange(11)}
    pruned = cut(weights_of(model), kept)
    assert pruned.architecture.spec.hidden == ((5, 2), (11,))
    expected = model.state_dict()["encoder.stages.0.2.pwconv1.weight"][[0, 8]]
    assert torch.equal(pruned.state["encoder.stages.0.1.pwconv1.weight"], expected)
    # Where nothing goes, nothing changes, to the bit.
    everything = {name: torch.arange(width) for name, width in widths(spec).items()}
    same = cut(weights_of(model), everything, measure(model.encoder, [images(1, 1)]))
    assert all(torch.equal(same.state[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # GRN's, of which it prunes the last dimension
def test_torch_pruning_cuts_the_same_of_timms_model() -> None:
    tp = pytest.importorskip("torch_pruning")
    ours = classifier(ConvNeXtSpec(depths=(1, 2, 1, 1), dims=(4, 6, 8, 10)))
    spec = ours.encoder.spec
    theirs = timm.create_model("convnextv2_tiny", depths=spec.depths, dims=spec.dims, num_classes=2).eval()
    theirs.load_state_dict(to_state(ours.state_dict(), spec, "timm"))
    kept = choose(ours.encoder, measure(ours.encoder, [images(2, 1, 32)]), 0.5, "hidden", "global", "activation")
    graph = tp.DependencyGraph().build_dependency(theirs, images(1, 0, 32))
    for name, channels in kept.items():
        _, i, j = name.split(".")
        layer = theirs.stages[int(i)].blocks[int(j)].mlp.fc1
        gone = sorted(set(range(layer.out_features)) - set(channels.tolist()))
        graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=gone).prune()
    pruned = cut(weights_of(ours), kept)
    expected = to_state(pruned.state, pruned.architecture.spec, "timm")
    assert expected.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, expected[name].reshape(value.shape)), name
    with torch.no_grad():
        torch.testing.assert_close(
            build_classifier(pruned)(images(2, 2, 32)), theirs(images(2, 2, 32)), atol=1e-5, rtol=1e-4
        )


# What it costs


def test_multiply_adds_are_those_that_are_published_and_fall_with_the_channels() -> None:
    # The paper's 4.47 G of tiny; half of the hidden channels leave half of the two Linears.
    tiny = VARIANTS["convnextv2_tiny"]
    whole = multiply_adds(Encoder(tiny), (224, 224))
    assert whole / 1e9 == pytest.approx(4.47, abs=0.02)
    half = uniformly(tiny, 0.5, "hidden")
    assert half.hidden_widths == ((192,) * 3, (384,) * 3, (768,) * 9, (1536,) * 3)
    linears = sum(n * (56 >> i) ** 2 * 8 * d * d for i, (n, d) in enumerate(zip(tiny.depths, tiny.dims, strict=True)))
    assert whole - multiply_adds(Encoder(half), (224, 224)) == linears // 2


# The command


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("models") / "tuned"
    save_classifier(dest, classifier(), weights_of(classifier(), image=IMAGE, class_names=("cat", "dog")))
    return dest


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("cat", "dog")):
        write_images(root / name, 5, seed)
    return root


def prune(model: Path, dest: Path, photos: Path, *more: str) -> int:
    return cli.main(
        ["prune", str(model), str(dest), "--data", str(photos), "--num_workers", "0", "--device", "cpu", *more]
    )


def test_what_is_pruned_loads_in_every_command(
    tuned: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned, common = tmp_path / "my pruned.safetensors", ["--num_workers", "0", "--device", "cpu"]
    assert prune(tuned, pruned, photos, "--how", "global") == 0
    out = capsys.readouterr().out
    assert "hidden channels: 120 -> 60" in out
    assert f"use: fcmae finetune LABELLED --init '{pruned}' --model.keep_head" in out
    assert "neither timm nor transformers can build such a network" in out
    blocks = tmp_path / "blocks.safetensors"
    assert prune(tuned, blocks, photos, "--what", "blocks") == 0
    assert "for transformers, as timm has no such network: fcmae convert" in capsys.readouterr().out
    assert cli.main(["convert", str(blocks), str(tmp_path / "hf"), "--to", "transformers"]) == 0
    weights = read_weights(pruned)
    assert sum(map(sum, weights.architecture.spec.hidden_widths)) == 60
    assert (weights.class_names, weights.image) == (("cat", "dog"), IMAGE)
    assert "0.5 of hidden kept, global by activation" in weights.origin["pruned"]

    assert cli.main(["predict", str(pruned), str(photos), *common]) == 0
    assert (
        cli.main(
            ["evaluate", str(pruned), "--data", str(photos), "--out", str(tmp_path / "e"), "--probes", "knn", *common]
        )
        == 0
    )
    small = {"epochs": 1, "batch_size": 4, "data.num_workers": 0, "log.trackers": "none", "data.image_size": 16}
    words = [f"--{key}={value}" for key, value in small.items()]
    runs.forget_accelerator()
    tuning = ["finetune", str(photos), "--config", str(runs.DEFAULTS), "--init", str(pruned), "--model.keep_head"]
    assert cli.main([*tuning, "--device=cpu", "--out", str(tmp_path / "run"), *words]) == 0
    assert read_weights(tmp_path / "run").architecture.spec == weights.architecture.spec
    assert cli.main(["convert", str(pruned), str(tmp_path / "timm")]) == 0
    assert "timm has no such network" in capsys.readouterr().out
    assert cli.main(["prune", str(pruned), str(tmp_path / "again.pth"), "--data", str(photos), *common]) == 0
    assert fcmae.load(tmp_path / "again.pth")(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 2, 8)


def test_timm_loads_what_lost_blocks(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(ConvNeXtSpec(depths=(1, 1, 3, 1), dims=(4, 6, 8, 10)))
    weights = weights_of(model, image=IMAGE.model_copy(update={"input_size": (3, 32, 32)}), class_names=("cat", "dog"))
    weights = replace(weights, origin={"epochs": 2.0, "top1": 0.93})
    save_weights(tmp_path / "whole.pth", weights, "fcmae")
    prune = partial(fcmae.prune, tmp_path / "whole.pth", tmp_path / "pruned.pth", photos, what="blocks", keep=0.67)
    with pytest.raises(ValueError, match="settings: keep: leave out what is an argument"):
        prune(settings={"keep": 0.5})
    with pytest.raises(ValueError, match="max_images: received 0"):
        prune(settings={"max_images": 0})
    prune()
    assert read_weights(tmp_path / "whole.pth").origin["top1"] == 0.93
    pruned = read_weights(tmp_path / "pruned.pth").origin
    assert pruned["epochs"] == 2.0 and "top1" not in pruned  # of another network
    fcmae.export(tmp_path / "pruned.pth", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    ours = build_classifier(read_weights(tmp_path / "pruned.pth"))
    assert ours.encoder.spec.depths == (1, 1, 2, 1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images(2, 1, 32)), ours(images(2, 1, 32)), atol=1e-5, rtol=1e-4)


def test_a_pretrained_encoder_keeps_its_decoder_and_goes_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ConvNeXtSpec(depths=(1, 1), dims=(4, 6), stem_stride=4)
    model = build_fcmae(Encoder(spec), 8, 1)
    randomize(model, std=0.1)
    weights = Weights(dict(model.state_dict()), Architecture(spec, decoder_depth=1, decoder_dim=8), IMAGE)
    save_weights(tmp_path / "whole.safetensors", weights, "fcmae")
    assert prune(tmp_path / "whole.safetensors", tmp_path / "pruned.safetensors", photos, "--by", "norm") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "the decoder is as it was" in line)
    kept = read_weights(tmp_path / "pruned.safetensors")
    assert all(torch.equal(v, kept.state[k]) for k, v in model.state_dict().items() if k.startswith("decoder."))
    words = shlex.split(line)  # the last ones are flags and their values, which stand above those of the test
    own = words[words.index("--init") :]
    given = {*own, "--model.stem_stride"}
    flags = iter(runs.flags(photos, tmp_path / "run", epochs=1))
    others = [word for flag in flags for word in (flag, next(flags)) if flag not in given]
    assert cli.main(["pretrain", *others, *own]) == 0
    assert "decoder too" in (tmp_path / "run" / "train.log").read_text()


def test_images_of_huge_numbers_are_told_and_nothing_is_written(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        np.save(tmp_path / "images" / f"{i}.npy", np.full((32, 32, 3), -3.4e38 if i else 0.5, np.float32))
    assert prune(tuned, tmp_path / "a.pth", tmp_path / "images") == 2
    assert "not finite: if missing pixels are stored as a huge number, give --nodata" in capsys.readouterr().err
    assert not (tmp_path / "a.pth").exists()
    assert prune(tuned, tmp_path / "a.pth", tmp_path / "images", "--nodata", "-3.4e38") == 0


def test_what_cannot_be_pruned_is_said(
    tuned: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.pth").touch()
    for dest, words, sentence in (
        ("there.pth", (), "exists: give a new path"),
        ("timm", (), "give it a name in .safetensors, .pth, .pt"),
        ("a.pth", ("--keep", "1"), "keep"),
        ("a.pth", ("--what", "blocks", "--by", "norm"), "a block of ConvNeXt V2 has no LayerScale"),
    ):
        assert prune(tuned, tmp_path / dest, photos, *words) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a.pth").exists()
