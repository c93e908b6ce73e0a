"""Check on this machine that every backend computes what the definition says, and time them: `fcmae verify`.

The definition is the masked backend in float64 on the CPU and, where nothing is hidden, timm's dense network. Values
and every gradient are compared, of the encoder and of the whole model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, get_args

import timm
import torch
from torch import Tensor, nn

from fcmae.config.base import Backend
from fcmae.data.source import one_line
from fcmae.layouts import make_layout
from fcmae.masked import FCMAE, build_fcmae, masked_loss
from fcmae.masking import num_visible, random_mask
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import VARIANTS, ContainerSpec, ConvNeXtSpec, NetworkSpec, describe, variant_of
from fcmae.timing import in_turn
from fcmae.weights.formats import rename

BACKENDS: tuple[str, ...] = get_args(Backend)
PATCH = 32  # pixels, side of a mask patch
REPEATS = 5  # turns of each backend that are timed


class Case(NamedTuple):
    """One comparison.

    Attributes:
        spec: the network.
        grid: rows and columns of mask patches.
        ratio: share of the patches that are hidden. 0 hides nothing: the reference is then timm's network, which must
            be a published one.
        batch: images.
        whole: the whole model and its loss, or the encoder and its features.
    """

    spec: NetworkSpec
    grid: tuple[int, int]
    ratio: float
    batch: int
    whole: bool

    def __str__(self) -> str:
        part = "model" if self.whole else "encoder"
        (rows, columns), hidden = self.grid, f"{100 * self.ratio:.0f} %"
        return f"{describe(self.spec)}, {part}, {rows} x {columns} patches, {hidden} hidden, batch {self.batch}"


ATTO = VARIANTS["convnextv2_atto"]
# V2, V1, one of our own and CONTAINER; square and not; one image and several; little, much and nothing hidden.
CASES = (
    Case(ATTO, (3, 5), 0.6, 2, whole=False),
    Case(ATTO, (3, 2), 0.6, 3, whole=True),
    Case(ATTO, (4, 4), 0.9, 1, whole=True),
    Case(ATTO, (2, 3), 0, 2, whole=False),
    Case(VARIANTS["convnext_tiny"], (1, 3), 0.4, 2, whole=False),  # V1, and an MLP of Linear layers in timm
    Case(ConvNeXtSpec(depths=(1, 2, 1), dims=(16, 24, 40), stem_stride=2), (2, 3), 0.5, 2, whole=True),
    # Attention, and smaller kernels.
    Case(
        ContainerSpec(
            depths=(1, 1, 1),
            dims=(16, 24, 40),
            affinity=("static", "dynamic", "mixed"),
            mlp_ratios=(4, 4, 4),
            num_heads=4,
            stem_stride=2,
        ),
        (2, 3),
        0.5,
        2,
        whole=True,
    ),
)

# Largest error allowed, relative to the largest element of the tensor that is compared. Rounding grows over some twenty
# blocks: of float64 from 1e-16 to 1e-14, of float32 from 6e-8 to 5e-6, of bfloat16 from 4e-3 to 5e-2.
TOLERANCES = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 0.2}


@dataclass(frozen=True)
class Result:
    """Largest difference of one backend from the reference in one precision, over all cases.

    Attributes:
        backend: name of the backend.
        precision: name of the precision.
        values: largest error of what is computed, relative to the largest element of its tensor.
        gradients: largest error of all gradients, each relative to the largest element of its tensor.
        worst: the case and tensor that is farthest off.
    """

    backend: str
    precision: str
    values: float
    gradients: float
    worst: str

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.precision]

    @property
    def ok(self) -> bool:
        return self.values <= self.tolerance and self.gradients <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"WRONG: {self.worst}"
        return (
            f"{self.backend:10} {self.precision:9} {self.values:9.1e} {self.gradients:10.1e} {self.tolerance:10.0e}"
            f"  {verdict}"
        )


def verify(backends: Sequence[str] | None = None, device: str = "cpu") -> list[Result]:
    """Compare and time backends, and print a table line by line as the results come.

    Args:
        backends: names; None takes all, and those that cannot run here are left out with a remark.
        device: cpu or cuda, where the backends run; the reference always runs on the CPU.

    Returns:
        A result for each backend and precision: float64, float32 and, on a GPU, float32 under bfloat16 autocast.

    Raises:
        ValueError: if a backend that was named, or the device, cannot be used.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}: torch finds no GPU here: use cpu")
    usable = []
    for backend in backends or BACKENDS:
        try:
            make_layout(backend, torch.zeros(1, 1, 1, dtype=torch.bool, device=device))
            usable.append(backend)
        except ValueError as error:
            if backends:
                raise
            print(f"{backend}: not checked: {error}")

    print("largest relative error of values and of gradients against the reference (masked and timm, float64, CPU)\n")
    print(f"{'backend':10} {'precision':9} {'values':>9} {'gradients':>10} {'tolerance':>10}")
    references = [reference(case) for case in CASES]
    results = []
    for precision in ("float64", "float32", *(["bfloat16"] if device != "cpu" else [])):
        for backend in usable:
            results.append(compare(backend, device, precision, references))
            print(results[-1], flush=True)

    print("\nmilliseconds for forward + backward of convnextv2_atto, 8 images of 224 px, 19 of 49 patches visible\n")
    working = [name for name in usable if all(math.isfinite(r.values) for r in results if r.backend == name)]
    for backend, ms in speeds(working, device).items():
        print(f"{backend:10} {ms:9.1f}")
    return results


def compare(backend: str, device: str, precision: str, references: Sequence[dict[str, Tensor]]) -> Result:
    """The largest errors of a backend over all CASES; infinite if it cannot run one.

    Args:
        backend: its name.
        device: where it runs.
        precision: a key of TOLERANCES.
        references: the reference tensors of CASES, in their order.
    """
    values = gradients = (0.0, "")
    for case, expected in zip(CASES, references, strict=True):
        try:
            found = tensors(case, backend, device, precision)
        except Exception as error:  # torch's, the engine's and the compilers', of a bad build or a full device
            return Result(backend, precision, math.inf, math.inf, f"{case}: {one_line(error)}")
        for name, tensor in expected.items():
            # A gradient that is absent is wrong, and so is NaN, which max() would pass over.
            same_shape = name in found and found[name].shape == tensor.shape
            off = float((found[name] - tensor).abs().max() / tensor.abs().max()) if same_shape else math.inf
            off = math.inf if math.isnan(off) else off
            if name == "values":
                values = max(values, (off, f"{case}: values"))
            else:
                gradients = max(gradients, (off, f"{case}: gradient of {name}"))
    return Result(backend, precision, values[0], gradients[0], max(values, gradients)[1])


def tensors(case: Case, backend: str, device: str, precision: str) -> dict[str, Tensor]:
    """What a backend computes in a case.

    Args:
        case: the case.
        backend: the backend's name.
        device: where it runs.
        precision: a key of TOLERANCES; "bfloat16" is float32 under CUDA's autocast.

    Returns:
        Its "values" and the gradient of each parameter, float64 on the CPU.
    """
    net, images, mask = make(case, backend)
    dtype = torch.float64 if precision == "float64" else torch.float32
    net.to(device, dtype)
    images, mask = images.to(device, dtype), mask.to(device)
    autocast = torch.autocast("cuda", torch.bfloat16) if precision == "bfloat16" else nullcontext()
    # cuDNN's convolutions take TF32, with 10 of float32's 23 bits, unless told otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), autocast:
        if isinstance(net, FCMAE):
            values = masked_loss(net, images, mask)
        else:
            layout = make_layout(backend, mask)
            values = layout.unpack(net(images, layout))  # (B, h, w, C)
    torch.autograd.backward(values, cotangent(values))
    return collected(values, ((name, p.grad) for name, p in net.named_parameters()))


def reference(case: Case) -> dict[str, Tensor]:
    """What `tensors` should be: of the masked backend or, with nothing hidden, of timm's dense network."""
    if case.ratio > 0:
        return tensors(case, "masked", "cpu", "float64")
    encoder, images, _ = make(case, "masked")
    dense = timm.create_model(variant_of(case.spec), num_classes=0)
    names = {name: rename(f"encoder.{name}", "timm") for name, _ in encoder.named_parameters()}
    own = dense.state_dict()
    own |= {names[name]: p.detach().view_as(own[names[name]]) for name, p in encoder.named_parameters()}
    dense.load_state_dict(own)
    dense.double()
    values = dense.forward_features(images.double()).permute(0, 2, 3, 1)  # (B, h, w, C)
    values.backward(cotangent(values))
    theirs = dict(dense.named_parameters())
    return collected(values, ((n, theirs[names[n]].grad.view_as(p)) for n, p in encoder.named_parameters()))


def make(case: Case, backend: str) -> tuple[StagedEncoder | FCMAE, Tensor, Tensor]:
    """The network, images and mask of a case, the same at every call, in float32 on the CPU."""
    rows, columns = case.grid
    with torch.device("meta"):
        encoder = make_encoder(case.spec)
        net = build_fcmae(encoder, 32, make_layout=partial(make_layout, backend)) if case.whole else encoder
    net.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in net.parameters():
            # No parameter keeps its initial zero or one, which would hide a mistake.
            nn.init.normal_(parameter, std=0.1)
        images = torch.randn(case.batch, 3, rows * PATCH, columns * PATCH)
    mask = torch.zeros(case.batch, rows, columns, dtype=torch.bool)
    if case.ratio > 0:
        visible = num_visible(rows * columns, case.ratio)
        mask = torch.from_numpy(random_mask(case.grid, visible, [(0, i) for i in range(case.batch)]))
    return net, images, mask


def cotangent(values: Tensor) -> Tensor:
    """The gradient that backward starts from: another number for each value, 1 for a scalar."""
    return torch.linspace(1, -1, values.numel(), dtype=values.dtype, device=values.device).view_as(values)


def collected(values: Tensor, gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    named = {"values": values.detach(), **{name: grad for name, grad in gradients if grad is not None}}
    return {name: tensor.cpu().double() for name, tensor in named.items()}


def speeds(backends: Sequence[str], device: str) -> dict[str, float]:
    """Median milliseconds of the encoder's forward + backward; backends take turns, so that a load slows them all.

    Args:
        backends: names.
        device: where they run.
    """
    encoder = make_encoder(ATTO).to(device)
    images = torch.randn(8, 3, 224, 224, device=device)
    mask = torch.from_numpy(random_mask((7, 7), 19, [(0, i) for i in range(8)])).to(device)

    def step(backend: str) -> None:
        encoder.zero_grad()
        encoder(images, make_layout(backend, mask, 19)).square().mean().backward()

    times = in_turn({name: partial(step, name) for name in backends}, REPEATS, device=torch.device(device))
    return {backend: 1000 * statistics.median(each) for backend, each in times.items()}
