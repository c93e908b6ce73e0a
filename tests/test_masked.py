from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MINKOWSKI, randomize
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fcmae.config import PretrainConfig
from fcmae.layouts import Layout, Masked, make_layout
from fcmae.layouts.sites import true_rows
from fcmae.masked import (
    FCMAE,
    Target,
    build_fcmae,
    hog,
    masked_loss,
    normalized_pixels,
    patch_statistics,
    patchify,
    pixels,
    reconstruction_loss,
    unpatchify,
)
from fcmae.masking import random_mask
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import GRN, Block
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.pretraining import build_model

SOON_COMPILED = ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 8, 8), stem_stride=2)


def mean_loss(*args: Any, **options: Any) -> Tensor:
    return reconstruction_loss(*args, **options).mean


def masks(batch: int, grid: tuple[int, int], visible: int) -> Tensor:
    return torch.from_numpy(random_mask(grid, visible, [(1, i) for i in range(batch)]))


SMALL = ConvNeXtSpec(depths=(2, 2, 3, 2), dims=(8, 12, 16, 24), stem_stride=1)


def small(
    variant: str | ConvNeXtSpec = SMALL,
    backend: str = "packed",
    grn_scope: str = "image",
    decoder_depth: int = 2,
    **options: object,
) -> FCMAE:
    """For images of two channels; total stride 8, if the spec has four stages."""
    spec = VARIANTS[variant].model_copy(update={"stem_stride": 1}) if isinstance(variant, str) else variant
    layout = partial(make_layout, backend, grn_scope=grn_scope)
    return build_fcmae(Encoder(spec, 2, **options), 16, decoder_depth, layout)


def losses_and_gradients(models: list[FCMAE], images: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    """Of each model, given the first one's weights."""
    found = []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        pred, site_mask = model(images, mask)
        loss = mean_loss(pred, images, site_mask)
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Equal up to rounding, relative to each tensor's largest element, as gradients differ by orders of magnitude.

    The sums are the same in another order: measured, 1e-14 in float64 and 5e-6 in float32 after some twenty layers.
    """
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4}[dtype]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance * float(tensor.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("mask_patch", [8, 16])
@pytest.mark.parametrize("backend", ["packed", MINKOWSKI])
def test_backends_give_the_same_loss_and_gradients(
    backend: str, mask_patch: int, scope: str, dtype: torch.dtype
) -> None:
    models = [small(backend=name, grn_scope=scope).to(dtype) for name in ("masked", backend)]
    randomize(models[0], std=0.1)
    images = torch.randn(2, 2, 2 * mask_patch, 3 * mask_patch, dtype=dtype)
    masked, other = losses_and_gradients(models, images, masks(2, (2, 3), 2))
    assert_same(other, masked, dtype)


def test_the_scope_of_grn_matters_in_a_batch_and_not_for_one_image() -> None:
    models = [small(grn_scope=scope).double() for scope in ("image", "batch")]
    randomize(models[0], std=0.1)
    images, mask = torch.randn(2, 2, 16, 24, dtype=torch.float64), masks(2, (2, 3), 2)
    image, batch = losses_and_gradients(models, images[:1], mask[:1])
    torch.testing.assert_close(batch, image)
    for model in models:
        model.zero_grad()
    image, batch = losses_and_gradients(models, images, mask)
    there, here = batch["decoder.proj.weight"], image["decoder.proj.weight"]
    assert (there - here).abs().max() > 1e-3 * here.abs().max()


def test_the_configuration_names_backend_and_scope() -> None:
    chosen = {"out": "run", "data": {"path": ["photos"]}, "model": {"backend": "masked", "grn_scope": "batch"}}
    model = build_model(PretrainConfig.model_validate(chosen))
    layout = model.make_layout(masks(1, (2, 2), 1), 1)
    assert isinstance(layout, Masked)
    assert layout.norm_dims == (0, 1, 2)  # of images, rows and columns: the whole batch


UNEVEN = torch.tensor([[[0, 1, 1], [1, 0, 1]], [[1, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]], dtype=torch.bool)


@pytest.mark.parametrize("backend", ["masked", MINKOWSKI])
def test_images_may_differ_in_their_number_of_visible_patches(backend: str) -> None:
    model = small(backend=backend).double()
    randomize(model, std=0.1)
    images = torch.randn(3, 2, 16, 24, dtype=torch.float64)
    pred, site_mask = model(images, UNEVEN)
    loss = mean_loss(pred, images, site_mask)
    # One at a time, the two that show something go the usual way; weights are their numbers of hidden patches.
    alone = []
    for i in range(2):
        single, single_mask = model(images[i : i + 1], UNEVEN[i : i + 1])
        assert torch.allclose(single[0], pred[i][UNEVEN[i].flatten()])
        alone.append(mean_loss(single, images[i : i + 1], single_mask))
    blind = mean_loss(pred[2:], images[2:], site_mask[2:])
    torch.testing.assert_close(loss, (4 * alone[0] + 1 * alone[1] + 6 * blind) / 11)


@pytest.mark.parametrize("backend", [MINKOWSKI])
def test_backends_agree_where_images_differ_in_their_number_of_visible_patches(backend: str) -> None:
    models = [small(backend=name).double() for name in ("masked", backend)]
    randomize(models[0], std=0.1)
    masked, other = losses_and_gradients(models, torch.randn(3, 2, 16, 24, dtype=torch.float64), UNEVEN)
    assert_same(other, masked)


def test_packed_refuses_images_that_differ_in_their_number_of_visible_patches() -> None:
    with pytest.raises(ValueError, match=r"\[0, 2, 5\] patches visible: every image needs the same number"):
        small()(torch.randn(3, 2, 16, 24), UNEVEN)


@pytest.mark.parametrize("depth", [1, 2])
def test_predicting_hidden_sites_only_changes_nothing(depth: int) -> None:
    model = small(decoder_depth=depth).double()
    randomize(model, std=0.1)
    mask = masks(2, (3, 2), 2)
    images = torch.randn(2, 2, 24, 16, dtype=torch.float64)
    hidden, site_mask = model(images, mask, num_visible=2)
    everywhere, _ = model(images, mask, hidden_only=False)
    assert everywhere.shape == (2, 6, 8 * 8 * 2)
    torch.testing.assert_close(hidden, everywhere.flatten(0, 1)[true_rows(site_mask, 4)].view_as(hidden))


def test_hidden_pixels_cannot_reach_the_prediction() -> None:
    model = small()
    randomize(model, std=0.1)
    mask = masks(1, (2, 2), 1)
    images = torch.randn(1, 2, 16, 16)
    changed = torch.where(mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 7.0, images)
    assert torch.equal(model(images, mask)[0], model(changed, mask)[0])


@pytest.mark.parametrize("variant", ["convnextv2_atto", "convnext_tiny"])
@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_every_parameter_gets_a_gradient(variant: str, backend: str) -> None:
    model = small(variant=variant, backend=backend)
    # GRN and biases start at zero, where some gradients vanish by design; draw them.
    randomize(model, std=0.05)
    images = torch.randn(2, 2, 24, 24)
    pred, site_mask = model(images, masks(2, (3, 3), 4))
    mean_loss(pred, images, site_mask).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.ne(0).any()]
    assert without == []


def test_the_encoders_parameters_carry_the_released_names_and_shapes() -> None:
    state = build_fcmae(Encoder(VARIANTS["convnextv2_atto"])).state_dict()
    expected = {
        "encoder.downsample_layers.0.0.weight": (40, 3, 4, 4),
        "encoder.downsample_layers.0.1.weight": (40,),
        "encoder.downsample_layers.1.0.weight": (40,),
        "encoder.downsample_layers.1.1.weight": (80, 40, 2, 2),
        "encoder.stages.0.0.dwconv.weight": (40, 1, 7, 7),
        "encoder.stages.0.0.norm.bias": (40,),
        "encoder.stages.0.0.pwconv1.weight": (160, 40),
        "encoder.stages.0.0.grn.gamma": (1, 1, 1, 160),
        "encoder.stages.0.0.pwconv2.weight": (40, 160),
        "decoder.proj.weight": (512, 320, 1, 1),
        "decoder.mask_token": (1, 512, 1, 1),
        "decoder.blocks.0.dwconv.weight": (512, 1, 7, 7),
        "decoder.blocks.0.grn.beta": (1, 1, 1, 2048),
        "decoder.pred.weight": (3072, 512, 1, 1),
        "decoder.pred.bias": (3072,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected


def test_initial_distributions_are_as_documented() -> None:
    model = build_fcmae(Encoder(VARIANTS["convnextv2_pico"]))
    drawn = [model.decoder.mask_token]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            drawn.append(module.weight)
            assert module.bias.eq(0).all()
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
        elif isinstance(module, GRN):
            assert module.gamma.eq(0).all()
            assert module.beta.eq(0).all()
    for weight in drawn:
        # Five standard errors of a sample mean and of a sample standard deviation of n normal draws.
        n = weight.numel()
        assert abs(weight.mean().item()) < 5 * 0.02 / n**0.5
        assert abs(weight.std().item() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
    v1 = Encoder(VARIANTS["convnext_tiny"])
    assert all(b.gamma.eq(1e-6).all() for b in v1.modules() if isinstance(b, Block))


def test_grn_by_hand() -> None:
    grn = GRN(2)
    with torch.no_grad():
        grn.gamma.fill_(2)
        grn.beta.fill_(1)
    x = torch.tensor([[[[3.0, 0.0], [4.0, 1.0]]]])  # channel norms 5 and 1, their mean 3
    y = grn(x, torch.tensor([[[[5.0, 1.0]]]]))
    expected = [[3 + 2 * 3 * 5 / 3 + 1, 1.0], [4 + 2 * 4 * 5 / 3 + 1, 1 + 2 * 1 / 3 + 1]]
    torch.testing.assert_close(y[0, 0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_norms_and_loss_are_float32_under_autocast(backend: str) -> None:
    model = small(backend=backend)
    with torch.no_grad():
        model.encoder.stages[0][0].pwconv1.weight.normal_(std=100)  # expanded features whose squares overflow float16
    images, mask = torch.randn(1, 2, 16, 16), masks(1, (2, 2), 2)
    with torch.autocast("cpu", dtype=torch.float16):
        pred, site_mask = model(images, mask)
    loss = mean_loss(pred, images, site_mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_bf16_is_close_to_float32(backend: str) -> None:
    model = small(backend=backend)
    images, mask = torch.randn(2, 2, 24, 24), masks(2, (3, 3), 4)
    exact, _ = model(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = model(images, mask)
    # bf16 keeps 8 bits: .4% an operation; some twenty blocks add up to a few percent of the spread.
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("backend", ["masked", MINKOWSKI])
def test_recomputing_blocks_changes_nothing_in_the_other_backends(backend: str) -> None:
    options = ({}, {"grad_checkpointing": True})
    models = [small(backend=backend, drop_path_rate=0.3, **option).double() for option in options]
    randomize(models[0], std=0.1)
    images, mask = torch.randn(2, 2, 24, 24, dtype=torch.float64), masks(2, (3, 3), 4)
    gradients = []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        torch.manual_seed(1)
        gradients += losses_and_gradients([model], images, mask)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", ["grad_checkpointing", "compile", "grad_checkpointing and compile"])
def test_memory_and_speed_options_change_nothing(options: str) -> None:
    # What is compiled has no drop path, whose draws a compiler orders otherwise.
    spec, rate = (SOON_COMPILED, 0.0) if "compile" in options else ("convnextv2_atto", 0.3)
    plain = small(spec, drop_path_rate=rate, decoder_depth=1)
    randomize(plain, std=0.1)
    recomputes = "grad_checkpointing" in options
    other = small(spec, drop_path_rate=rate, decoder_depth=1, grad_checkpointing=recomputes)
    other.load_state_dict(plain.state_dict())
    if "compile" in options:
        torch.compiler.reset()  # as runs do, see compile_model
        # aot_eager traces and differentiates the same graph without waiting for a C++ compiler.
        other.compile(backend="aot_eager", fullgraph=True)
    images, mask = torch.randn(2, 2, 24, 24), masks(2, (3, 3), 4)
    for model in (plain, other):
        torch.manual_seed(1)
        masked_loss(model, images, mask, 4).backward()
    for p, o in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, o.grad, atol=1e-6, rtol=1e-4)


def test_a_step_is_one_graph_that_is_compiled_once() -> None:
    model = small(SOON_COMPILED, drop_path_rate=0.3, decoder_depth=1)
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()  # as runs do, see compile_model
    model.compile(backend=counter, fullgraph=True)
    for batch in range(3):
        images = torch.randn(2, 2, 24, 24, generator=torch.Generator().manual_seed(batch))
        mask = torch.from_numpy(random_mask((3, 3), 4, [(batch, i) for i in range(2)]))
        masked_loss(model, images, mask, 4).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_a_step_never_waits_for_the_device(backend: str) -> None:
    # Fake tensors have shapes and no values: whatever asked for a value would have to wait for the device, and raises.
    with FakeTensorMode():
        model = small(backend=backend)
        images, mask = torch.empty(2, 2, 24, 24), torch.empty(2, 3, 3, dtype=torch.bool)
        loss = masked_loss(model, images, mask, 4)
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert all(parameter.grad is not None for parameter in model.parameters())


# The objective as a function


@pytest.mark.parametrize("target", [normalized_pixels, pixels])
def test_masked_loss_is_the_loss_of_each_image_under_each_of_its_masks(target: Target) -> None:
    model = small(ConvNeXtSpec(depths=(1, 1), dims=(4, 6))).double()
    randomize(model, std=0.1)
    images, several = torch.randn(2, 2, 24, 16, dtype=torch.float64), masks(6, (3, 2), 2)
    one_by_one = []
    for number, mask in enumerate(several):
        image = images[number // 3][None]  # the three masks of an image follow each other
        pred, site_mask = model(image, mask[None])
        one_by_one.append(mean_loss(pred, image, site_mask, target=target))
    found = masked_loss(model, images, several, 2, target=target)
    torch.testing.assert_close(found, torch.stack(one_by_one).mean())
    assert torch.equal(masked_loss(model, images, several, target=target), found)  # counted


def test_target_and_decoder_are_parts_that_see_hidden_patches_and_every_stage() -> None:
    class Ones(nn.Module):
        def forward(self, stages: list[Tensor], layout: Layout, site_mask: Tensor, num_hidden: int) -> Tensor:
            assert [tuple(layout.unpack(f).shape) for f in stages] == [(2, 6, 4, 4), (2, 3, 2, 6)]
            return torch.ones(len(site_mask), num_hidden, 1)

    def place(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None) -> Tensor:
        assert images.shape == (2, 2, 24, 16)
        assert patch == 8
        return hidden[:, None].float()

    model = FCMAE(Encoder(ConvNeXtSpec(depths=(1, 1), dims=(4, 6)), 2), Ones(), target=place)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 0, 1] = mask[1, 2, 0] = False  # patches 1 and 10 of 12
    for given in ({"target": model.target}, {}):  # its own, where none is given
        loss = masked_loss(model, torch.randn(2, 2, 24, 16), mask, 1, **given)
        assert float(loss) == np.mean([(1 - i) ** 2 for i in range(12) if i not in (1, 10)])
    wrapped = nn.Module()  # as for several processes
    wrapped.module, wrapped.forward = model, model.forward
    assert torch.equal(masked_loss(wrapped, torch.randn(2, 2, 24, 16), mask, 1), loss)
    with pytest.raises(ValueError, match=r"target: the model has none of its own: give one"):
        masked_loss(model.forward, torch.randn(2, 2, 24, 16), mask, 1)


def test_no_gradient_goes_through_a_target_and_no_network_is_one() -> None:
    teacher = nn.Linear(3, 1)

    def taught(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None) -> Tensor:
        return teacher(images.mean((2, 3))).repeat_interleave(2, 0)  # of two hidden patches each

    pred = torch.zeros(2, 2, 1, requires_grad=True)
    mask = torch.tensor([[[True, True]], [[True, True]]])
    mean_loss(pred, torch.randn(2, 3, 8, 16), mask, target=taught).backward()
    assert teacher.weight.grad is None and pred.grad is not None
    encoder = Encoder(ConvNeXtSpec(depths=(1, 1), dims=(4, 6)), 3)
    with pytest.raises(ValueError, match=r"target: a module \(Linear\) would be learnt and stored"):
        FCMAE(encoder, nn.Identity(), target=teacher)
    with pytest.raises(ValueError, match=r"target: it has the shape \(4, 1\), the predictions have \(4, 3\)"):
        mean_loss(torch.zeros(2, 2, 3), torch.randn(2, 3, 8, 16), mask, target=taught)


@pytest.mark.parametrize(
    ("num_masks", "size", "message"),
    [
        (1, (32, 32), "masks: received 1 for 2 images; give as many of each"),
        (3, (32, 32), "masks: received 3 for 2 images; give as many of each"),
        (2, (32, 64), r"mask: received \(2, 4, 4\) for images \(2, 2, 32, 64\); give one of each image"),
        (2, (16, 16), r"mask: received \(2, 4, 4\) for images \(2, 2, 16, 16\); give one of each image"),
    ],
)
def test_masks_that_are_not_those_of_the_images_are_refused(
    num_masks: int, size: tuple[int, int], message: str
) -> None:
    model = build_fcmae(Encoder(ConvNeXtSpec(depths=(1, 1), dims=(4, 6)), 2), 8)
    mask = torch.zeros(num_masks, 4, 4, dtype=torch.bool)
    mask[:, 0] = True
    with pytest.raises(ValueError, match=message):
        masked_loss(model, torch.randn(2, 2, *size), mask)


def test_masked_loss_refuses_masks_that_hide_nothing_or_all() -> None:
    model, images = small(ConvNeXtSpec(depths=(1, 1), dims=(4, 6))), torch.randn(1, 2, 16, 16)
    with pytest.raises(ValueError, match="hides no patch"):
        masked_loss(model, images, torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="leaves no patch visible"):
        masked_loss(model, images, torch.ones(1, 2, 2, dtype=torch.bool))


def test_three_stages_learn_an_8x8_grid_of_8_pixel_patches_on_images_of_64_pixels() -> None:
    spec = ConvNeXtSpec(depths=(1, 1, 1), dims=(8, 12, 16), stem_stride=2)
    model = build_fcmae(Encoder(spec), 16)
    assert model.encoder.total_stride == 8
    images, mask = torch.randn(4, 3, 64, 64), masks(4, (8, 8), 26)
    pred, _ = model(images, mask)
    assert pred.shape == (4, 64 - 26, 8 * 8 * 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = masked_loss(model, images, mask, 26)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


# Target and loss


def test_patch_values_are_ordered_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Second patch of the first row: pixels (0..1, 2..3), channels fastest.
    expected = [float(images[1, c, r, col]) for r in (0, 1) for col in (2, 3) for c in range(3)]
    assert patches[1, 1].tolist() == expected


def test_unpatchify_inverts_patchify() -> None:
    images = torch.randn(2, 5, 6, 9)
    assert torch.equal(unpatchify(patchify(images, 3), 3, (6, 9)), images)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_mean_over_hidden_patches(normalize: bool) -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]]], dtype=torch.bool)
    pred = torch.randn(2, 3, 48, dtype=torch.float64)
    errors = []
    for i in range(2):
        hidden = [(r, c) for r in range(2) for c in range(3) if mask[i, r, c]]
        for answer, (r, c) in zip(pred[i].numpy(), hidden, strict=True):
            target = images[i, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].permute(1, 2, 0).reshape(-1).numpy()
            if normalize:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((answer - target) ** 2).mean())
    loss = mean_loss(pred, images, mask, target=normalized_pixels if normalize else pixels)
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_missing_values_are_in_no_loss_and_in_no_statistic(normalize: bool) -> None:
    """Against numpy, value by value: one patch is known in part, one by a single value, one not at all, one whole."""
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]]], dtype=torch.bool)
    known = torch.rand(1, 3, 8, 12) < 0.5
    known[..., :4, :4], known[..., 4:, 4:8] = False, True  # none of the first patch, all of the last
    known[..., 4:, :4] = False
    known[0, 1, 5, 2] = True  # one value
    pred = torch.randn(1, 4, 48, dtype=torch.float64, requires_grad=True)
    errors, gradient = [], np.zeros((4, 48))
    for number, (r, c) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        place = (0, slice(None), slice(4 * r, 4 * r + 4), slice(4 * c, 4 * c + 4))
        values, is_known = (x[place].permute(1, 2, 0).reshape(-1).numpy() for x in (images, known))
        there = values[is_known]
        if normalize and len(there):
            values = (values - there.mean()) / np.sqrt((there.var(ddof=1) if len(there) > 1 else 0) + 1e-6)
        error = pred[0, number].detach().numpy() - values
        errors.extend(error[is_known] ** 2)
        gradient[number] = np.where(is_known, 2 * error, 0)
    target = normalized_pixels if normalize else pixels
    loss = mean_loss(pred, images, mask, target=target, known=known)
    assert float(loss.detach()) == pytest.approx(np.mean(errors), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(pred.grad[0].numpy(), gradient / len(errors), rtol=1e-9, atol=1e-12)
    everything = mean_loss(pred, images, mask, target=target, known=torch.ones_like(known))
    torch.testing.assert_close(everything, mean_loss(pred, images, mask, target=target))
    pred.grad = None
    # Apart, images count by what of them is known.
    halves = torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.rand(2, 3, 8, 12) < 0.5
    halves[1][0, :, :4] = False
    masks = mask.expand(2, -1, -1)
    preds = torch.randn(2, 4, 48, dtype=torch.float64)
    parts = [
        reconstruction_loss(preds[i : i + 1], halves[0][i : i + 1], mask, target=target, known=halves[1][i : i + 1])
        for i in range(2)
    ]
    weights = torch.stack([torch.as_tensor(part.share) for part in parts]).double()
    together = mean_loss(preds, halves[0], masks, target=target, known=halves[1])
    torch.testing.assert_close(
        (torch.stack([part.mean for part in parts]) * weights).sum() / weights.sum(), together, atol=1e-6, rtol=1e-6
    )
    nothing = mean_loss(pred, images, mask, target=target, known=torch.zeros_like(known))
    nothing.backward()
    assert float(nothing.detach()) == 0 and not pred.grad.any()


def test_a_histogram_counts_where_no_pixel_that_it_sees_is_missing() -> None:
    images, hidden = torch.randn(1, 2, 16, 32), torch.arange(2)
    known = torch.ones(1, 2, 16, 32, dtype=torch.bool)
    known[0, 1, 3, 8] = False  # of the second channel, in the second cell of the first row, at the border of the first
    plain, found = (hog(images, hidden, 16, given).view(2, 2, 2, 2, 9) for given in (None, known))
    left_out = torch.zeros(2, 2, 2, 2, 9, dtype=torch.bool)
    left_out[0, 0, :, 1] = True
    assert torch.equal(found.isnan(), left_out)
    assert torch.equal(found[~left_out], plain[~left_out])


def test_missing_values_are_those_of_an_image_under_each_of_its_masks() -> None:
    model = small(ConvNeXtSpec(depths=(1, 1), dims=(4, 6))).double()
    randomize(model, std=0.1)
    images, several = torch.randn(2, 2, 24, 16, dtype=torch.float64), masks(6, (3, 2), 2)
    known = torch.rand(2, 2, 24, 16) < 0.7
    found = masked_loss(model, images, several, 2, known=known)
    pred, site_mask = model(images.repeat_interleave(3, 0), several)
    each = known.repeat_interleave(3, 0)
    expected = mean_loss(pred, images.repeat_interleave(3, 0), site_mask, known=each)
    torch.testing.assert_close(found, expected)


def test_the_loss_of_16_bit_predictions_is_float32() -> None:
    images = torch.randn(1, 1, 4, 4)
    mask = torch.tensor([[[True, False], [False, False]]])
    loss = mean_loss(torch.full((1, 1, 4), 300.0, dtype=torch.float16), images, mask)
    assert loss.dtype == torch.float32  # 300 squared is infinite in float16
    assert float(loss) == pytest.approx(90000, rel=0.02)


def test_a_constant_patch_has_a_finite_target() -> None:
    mean, std = patch_statistics(torch.full((1, 4), 0.5))
    assert mean.item() == 0.5
    assert std.item() == pytest.approx(1e-3)


def test_nothing_hidden_is_refused() -> None:
    with pytest.raises(ValueError, match="hides no patch"):
        mean_loss(torch.empty(1, 0, 48), torch.randn(1, 3, 8, 8), torch.zeros(1, 2, 2, dtype=torch.bool))


def hog_by_loops(image: NDArray[np.float64], cell: int) -> NDArray[np.float64]:
    """(C, H, W) to (H / cell, W / cell, C, 9), a pixel after the other."""
    num_channels, height, width = image.shape
    found = np.zeros((height // cell, width // cell, num_channels, 9))
    for c, y, x in np.ndindex(image.shape):
        along_x = image[c, y, x + 1] - image[c, y, x - 1] if 0 < x < width - 1 else 0.0
        along_y = image[c, y + 1, x] - image[c, y - 1, x] if 0 < y < height - 1 else 0.0
        degrees = math.degrees(math.atan2(along_y, along_x)) % 180
        found[y // cell, x // cell, c, int(degrees // 20)] += math.hypot(along_x, along_y)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_hog_is_that_of_loops_over_pixels(patch: int) -> None:
    hidden = [0, 1, 5, 8, 11]  # of two images of 2 x 3 patches
    images, cell = torch.randn(2, 2, 2 * patch, 3 * patch), min(patch, 8)
    found = hog(images, torch.tensor(hidden), patch)
    n = patch // cell
    assert found.shape == (5, n * n * 2 * 9)
    whole = [hog_by_loops(image.double().numpy(), cell) for image in images]
    for number, values in zip(hidden, found, strict=True):
        row, column = divmod(number % 6, 3)
        expected = whole[number // 6][row * n : (row + 1) * n, column * n : (column + 1) * n]
        np.testing.assert_allclose(values.numpy(), expected.ravel(), atol=1e-5)


def test_hog_of_edges_and_of_nothing() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    first = torch.zeros(1, dtype=torch.int64)
    assert hog(ramp, first, 8)[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]  # along x: 0 degrees
    assert hog(-ramp, first, 8)[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]  # and its sign does not count
    assert hog(ramp.transpose(2, 3), first, 8)[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]  # 90 degrees
    assert hog(torch.ones(1, 1, 8, 8), first, 8).eq(0).all()
    with pytest.raises(ValueError, match=r"a patch of 12 pixels, .* is no multiple of HOG's cells of 8"):
        hog(torch.zeros(1, 1, 12, 12), first, 12)
