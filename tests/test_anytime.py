"""Exits on an encoder's stages: packed and masked agree, what has left has no influence, and full openness is dense."""

from __future__ import annotations

from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import Tensor

from fcmae import anytime
from fcmae.anytime import Answer, Anytime, build_segmenter, least_sure, narrow_masked, narrow_packed, unsure
from fcmae.heads import Exits, FeaturePyramid, Segmenter
from fcmae.layouts import DENSE, Masked, Packed
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import ContainerSpec, ConvNeXtSpec, NetworkSpec, RoadmapSpec
from fcmae.segmentation import segmentation_loss

SPEC = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=2)  # patches of 16 pixels
CONTAINER = ContainerSpec(
    depths=(1, 1, 1), dims=(4, 6, 8), affinity=("static", "dynamic", "mixed"), mlp_ratios=(2, 2, 2), num_heads=2,
    stem_stride=4,
)  # fmt: skip
# Exact algebra in another order.
TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


def model_of(spec: NetworkSpec = SPEC, tau: float = 0.5, quantile: float = 0.0) -> Anytime:
    model = build_segmenter(make_encoder(spec), "anytime", 3, 5, tau, quantile)
    assert isinstance(model, Anytime)
    randomize(model)
    return model.double().eval()


def images_of(batch: int, height: int = 48, width: int = 80) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def middle_tau(model: Anytime, image: Tensor, share: float = 0.5) -> float:
    """A threshold that about this share of the patches passes at the first exit."""
    return float(next(model.anytime(image)).confidence.quantile(share))


def masked_answers(model: Anytime, images: Tensor, tau: float | None, budget: float = 0.5) -> list[Answer]:
    """By the definition: dense maps, with the hidden patches zeroed."""
    num = [round(images.shape[2] * images.shape[3] / model.encoder.total_stride**2)]

    def choose(stage: int, confidence: Tensor, hidden: Tensor) -> tuple[Tensor, None]:
        if tau is not None:
            return unsure(confidence, hidden, tau), None
        return least_sure(confidence, hidden, -int(-num[0] * budget // 1)), None

    with torch.no_grad():
        return list(model.answers(images, choose, narrow_masked))


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.computed, other.computed)
        torch.testing.assert_close(one.logits, other.logits, **TOLERANCE)
        torch.testing.assert_close(one.confidence, other.confidence, atol=1e-5, rtol=1e-5)  # of float32


@pytest.mark.parametrize("spec", [SPEC, CONTAINER], ids=["convnext", "container"])
@pytest.mark.parametrize("size", [(48, 80), (16, 48)])
def test_packed_and_masked_agree_under_a_threshold(spec: NetworkSpec, size: tuple[int, int]) -> None:
    model, image = model_of(spec), images_of(1, *size)
    tau = middle_tau(model, image)
    found = list(model.anytime(image, tau=tau))
    shares = [float(answer.computed.double().mean()) for answer in found]
    assert shares[0] == 1 and 0 < shares[1] < 1
    assert_same(found, masked_answers(model, image, tau)[: len(found)])


@pytest.mark.parametrize("budget", [0.5, 0.1, 1.0])
def test_packed_and_masked_agree_under_a_budget_at_any_batch(budget: float) -> None:
    model, images = model_of(), images_of(3)
    found = list(model.anytime(images, budget=budget))
    assert_same(found, masked_answers(model, images, None, budget))
    counts = torch.stack([answer.computed.flatten(1).sum(1) for answer in found])
    assert counts.tolist() == [[15] * 3] + [[{0.5: 8, 0.1: 2, 1.0: 15}[budget]] * 3] * 3
    for i, image in enumerate(images.split(1)):
        alone = list(model.anytime(image, budget=budget))
        torch.testing.assert_close(alone[-1].logits[0], found[-1].logits[i], **TOLERANCE)


def test_a_budget_may_shrink_and_never_grows_again() -> None:
    model, images = model_of(), images_of(2)
    found = [int(answer.computed[0].sum()) for answer in model.anytime(images, budget=(0.4, 0.9, 0.2))]
    assert found == [15, 6, 6, 3]
    # .55 of 100 is 55.00000000000001 in binary.
    images = images_of(1, 10 * model.encoder.total_stride, 10 * model.encoder.total_stride)
    assert [int(answer.computed.sum()) for answer in model.anytime(images, budget=0.55)][1:] == [55] * 3


def test_with_nothing_hidden_the_answers_are_the_exits_of_the_dense_network() -> None:
    model, image = model_of(tau=1.0), images_of(1)
    maps, found = model.encoder.pyramid(image, DENSE), list(model.anytime(image))
    logits = [head(f).permute(0, 3, 1, 2) for head, f in zip(model.head, maps, strict=True)]
    for i, answer in enumerate(found):
        summed = sum(F.interpolate(each, found[0].logits.shape[2:]) for each in logits[: i + 1])
        torch.testing.assert_close(answer.logits, summed, **TOLERANCE)
        assert answer.computed.all()
    assert torch.equal(model(image), F.interpolate(found[-1].logits, (48, 80), mode="bilinear"))


def by_hand(layer: torch.nn.Sequential, x: Tensor) -> Tensor:
    linear, norm = layer[0], layer[1]
    return F.gelu(
        F.layer_norm(F.linear(x, linear.weight, linear.bias), norm.weight.shape, norm.weight, norm.bias, 1e-6)
    )


def test_an_exit_is_its_equation() -> None:
    head = model_of().head.exits[1]  # patches of 4x4 sites
    f = torch.randn(2, 8, 12, 6, dtype=torch.float64)

    def pooled(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    level = by_hand(head.lateral, f)
    context = by_hand(head.pooled[1], pooled(by_hand(head.pooled[0], pooled(level))))
    fused = by_hand(head.fuse, level + F.interpolate(context.permute(0, 3, 1, 2), scale_factor=4).permute(0, 2, 3, 1))
    torch.testing.assert_close(head(f), F.linear(fused, head.classify.weight, head.classify.bias))


@pytest.mark.parametrize("quantile", [0.0, 0.25, 1.0])
def test_a_patch_is_as_sure_as_its_least_sure_site_or_the_quantiles(quantile: float) -> None:
    head, logits = Exits((4, 6, 8), 3, 5, quantile=quantile), torch.randn(2, 8, 12, 3)
    largest = logits.softmax(-1).amax(-1)
    for b in range(2):
        for y, x in ((0, 0), (1, 2)):
            sites = largest[b, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten().sort().values
            expected = sites[int(quantile * 15)]
            torch.testing.assert_close(head.confidence(logits)[b, y, x, 0], expected)
            rows = logits[b, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            torch.testing.assert_close(head.confidence(rows)[0, 0, 0], expected)


def test_a_patch_that_has_left_keeps_its_logits_and_reaches_nothing() -> None:
    """Pixels of a patch that left act on the others by the stages before alone: its later features are cut off."""
    model, images = model_of(), images_of(1)
    encoder, mask = model.encoder, torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 0, 0] = True
    f = encoder.stage(0, encoder.stem(images, DENSE), DENSE)
    spoiled = f.clone()
    spoiled[:, 8:16, 16:24] = torch.inf  # the features of a hidden patch
    for narrow in (narrow_masked, narrow_packed):
        results = []
        for features in (f, spoiled):
            layout, rows = narrow(mask, 13, DENSE, features)
            results.append(layout.unpack(encoder.stage(1, encoder.downsample(1, rows, layout), layout)))
        assert torch.equal(*results)
    found = list(model.anytime(images, budget=0.5))
    for before, after in pairwise(found):
        left = ~after.computed.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
        assert left.any() and torch.equal(before.logits[left], after.logits[left])


def test_rows_are_gathered_from_a_wider_layout() -> None:
    x = torch.arange(2 * 6 * 8.0).view(2, 6, 8, 1)
    wide = torch.rand(2, 3, 4).argsort(-1) == 0  # one hidden a row
    narrow = wide.clone()
    narrow[0, 0], narrow[1, 1] = True, True
    wider, layout = Packed(wide, 9), Packed(narrow, 6)
    assert torch.equal(layout.take(wider.pack(x), wider), layout.pack(x))
    for each in (layout, Masked(narrow)):
        expected = torch.where(narrow.repeat_interleave(2, 1).repeat_interleave(2, 2)[..., None], x + 1, x)
        assert torch.equal(each.paste(x + 1, each.pack(x)), expected)


def test_training_gives_each_exits_answer_with_the_masks_on() -> None:
    model, images = model_of(), images_of(2)
    with torch.no_grad():
        for head in list(model.head)[1:]:  # they add little, so that some patches stay to the end
            head.classify.weight.mul_(0.01)
            head.classify.bias.mul_(0.01)
    model.head.tau = middle_tau(model, images[:1])
    expected = masked_answers(model, images, model.head.tau)
    assert expected[-1].computed.any()
    model.train()
    outs = model(images)
    assert outs.shape == (4, 2, 3, 48, 80)
    for out, answer in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, answer.pixels(), **TOLERANCE)
    assert not expected[1].computed.all()
    target = torch.randint(0, 3, (2, 48, 80))
    loss = segmentation_loss(outs, target)
    torch.testing.assert_close(loss, sum(segmentation_loss(out, target) for out in outs))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gradients_are_those_of_packed_rows() -> None:
    model, images = model_of(), images_of(1)
    tau = middle_tau(model, images)

    def choose(stage: int, confidence: Tensor, hidden: Tensor) -> tuple[Tensor, int]:
        hidden = unsure(confidence, hidden, tau)
        return hidden, int((~hidden).sum())

    grads = []
    for narrow in (narrow_masked, narrow_packed):
        model.zero_grad()
        torch.stack([answer.logits.square().sum() for answer in model.answers(images, choose, narrow)]).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_answers_end_when_every_patch_has_left() -> None:
    model, image = model_of(tau=0.0), images_of(1)
    assert len(list(model.anytime(image))) == 1
    torch.testing.assert_close(model(image), next(model.anytime(image)).pixels())
    model.train()
    assert len(model(image)) == 4  # each exit has a loss all the same
    model(image).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_nothing_is_computed_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stages = model_of(), list[int]()
    stage = model.encoder.stage
    monkeypatch.setattr(model.encoder, "stage", lambda i, *rest: stages.append(i) or stage(i, *rest))
    answers = model.anytime(images_of(1), tau=1.0)
    next(answers), next(answers)
    assert stages == [0, 1]


def test_each_image_of_a_batch_is_predicted_as_alone() -> None:
    model, images = model_of(), images_of(3)
    model.head.tau = middle_tau(model, images[:1])
    torch.testing.assert_close(model(images), torch.cat([model(image) for image in images.split(1)]), **TOLERANCE)


@pytest.mark.parametrize(("limit_s", "num"), [(0.0, 1), (2.5, 3), (100.0, 4)])
def test_within_a_time_the_best_answer_so_far_is_given(
    limit_s: float, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = model_of(tau=1.0), images_of(2)
    clock = count()  # a second each time that somebody looks
    monkeypatch.setattr(anytime, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = model.within(images[:1], limit_s=limit_s)
    assert torch.equal(found, list(model.anytime(images[:1]))[num - 1].pixels())
    both = model.within(images, limit_s=2 * limit_s)  # they share it
    assert torch.equal(both[:1], found)
    assert torch.equal(model.within(images, budget=0.5, limit_s=0), next(model.anytime(images, budget=0.5)).pixels())


@pytest.mark.parametrize("choice", [{"budget": 0.5}, {"tau": 1.0}])
def test_a_limit_binds_where_work_is_done_after_it_was_given(
    choice: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image, given, waited = model_of(), images_of(1), list[int](), [0]  # a stage is a second, once waited for
    stage = model.encoder.stage
    monkeypatch.setattr(model.encoder, "stage", lambda i, *rest: given.append(i) or stage(i, *rest))
    monkeypatch.setattr(anytime, "time", SimpleNamespace(perf_counter=lambda: waited[-1]))
    monkeypatch.setattr(anytime, "wait", lambda device: waited.append(len(given)))
    model.within(image, **choice)
    assert given == [0, 1, 2, 3] and waited == [0]  # without a limit nobody waits
    given.clear()
    model.within(image, limit_s=2, **choice)
    assert given == [0, 1] and waited == [0, 0, 1, 2]


def test_what_cannot_be_answered_is_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="received 40x64; give multiples of the total stride 16"):
        model(images_of(1, 40, 64))
    for tau in (95, -0.1):
        with pytest.raises(ValueError, match=f"tau = {tau}: give a probability, 0 to 1"):
            next(model.anytime(images_of(1), tau=tau))
    with pytest.raises(ValueError, match="received 2 of them without a budget"):
        next(model.anytime(images_of(2)))
    for budget in (0, 1.5, (0.5, 0.5)):
        with pytest.raises(ValueError, match="give a share above 0 and up to 1, or 3 of them"):
            next(model.anytime(images_of(2), budget=budget))


def test_heads_are_built_by_name() -> None:
    encoder = make_encoder(SPEC)
    assert isinstance(build_segmenter(encoder, "pyramid", 3), Segmenter)
    assert isinstance(build_segmenter(encoder, "pyramid", 3).head, FeaturePyramid)
    head = build_segmenter(encoder, "anytime", 3).head
    assert isinstance(head, Exits) and (head.dim, head.tau, head.quantile) == (32, 0.998, 0.0)


def test_exits_of_a_network_that_cannot_hide_patches_are_refused() -> None:
    spec = RoadmapSpec(depths=(1, 1), dims=(8, 16))
    assert spec.dense_only
    with pytest.raises(ValueError, match=r"model\.head = anytime is not for .*: choose another head or network"):
        build_segmenter(make_encoder(spec), "anytime", 3)
