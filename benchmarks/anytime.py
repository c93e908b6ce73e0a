"""Time a segmentation that may stop, against the dense network, at the accuracy that each reaches.

    python benchmarks/anytime.py --model runs/anytime --data runs/landsea/test.csv --picture anytime.png
    python benchmarks/anytime.py --model runs/anytime --against runs/pyramid --data runs/landsea/test.csv
    python benchmarks/anytime.py --variant convnextv2_atto --size 512        # random weights: time alone, by budgets

dense computes every patch at every stage and the last answer alone; full is the anytime path with nothing hidden;
exit-K stops after stage K; tau-T and budget-B are what their names say; against is another model, whole. Images are
seen one at a time, whole. Sides take turns within each repeat, and ratios are to dense. Multiply-adds are those that
torch's operations executed: the depthwise convolution's on all of the map. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fcmae.anytime import Anytime, build_segmenter
from fcmae.data.index import find_mapped
from fcmae.data.maps import IGNORED
from fcmae.data.rasters import LabelMap, Raster
from fcmae.data.split import evenly
from fcmae.evaluation.pictures import displayable, save_figure
from fcmae.heads import add_nearest, resized
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS
from fcmae.segmentation import Scores, overlay
from fcmae.tables import table
from fcmae.weights.segmenters import read_segmenter

Run = Callable[[Tensor], Tensor]  # (1, C, H, W) normalised to logits of every pixel
BINS = 15  # of probabilities, in a reliability diagram
SHOWN = 3  # images of a picture


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    timing.check_repeats(args)
    torch.manual_seed(0)
    device = torch.device(args.device)
    info = timing.machine(device)
    model, images, truths = read(args)
    model = model.to(device).eval()
    images = [image.to(device) for image in images]
    runs = sides(model, args)
    if args.against is not None:
        runs["against"] = read_segmenter(args.against)[0].to(device).eval().forward
    timed = [images[i] for i in evenly(len(images), args.images)]

    def step(run: Run) -> Callable[[], object]:
        def each() -> None:
            with torch.no_grad(), timing.autocast(args):
                for image in timed:
                    run(image)

        return each

    seconds = timing.interleaved({name: step(run) for name, run in runs.items()}, args.repeats, device=device)
    results: dict[str, Any] = {}
    for name, run in runs.items():
        per_image = timing.summary([each / len(timed) for each in seconds[name]])
        macs = multiply_adds(step(run)) / len(timed)
        results[name] = {**per_image, "multiply_adds": macs, **scored(run, images, truths)}
    ratios = {name: timing.ratio(each, seconds["dense"]) for name, each in seconds.items()}
    rows = []
    for name, found in results.items():
        rows.append(
            [
                name,
                f"{1000 * found['median_s']:.1f} ms",
                f"{ratios[name]['time']:.2f}",
                "{:.2f} - {:.2f}".format(*ratios[name]["quartiles"]),
                f"{found['multiply_adds'] / 1e6:.0f} M",
                f"{found['multiply_adds'] / results['dense']['multiply_adds']:.2f}",
                f"{100 * found['miou']:.2f}" if "miou" in found else "",
            ]
        )
    header = ["", "an image", "time / dense", "quartiles", "multiply-adds", "/ dense", "mean IoU, %"]
    print("\n" + table(header, rows))
    calibration = []
    if truths:
        calibration = reliability(model, images, truths)
        exits = [
            [str(i), f"{each['ece']:.4f}", f"{100 * each['accuracy']:.2f}"] for i, each in enumerate(calibration, 1)
        ]
        print("\n" + table(["exit", "ECE", "pixels right, %"], exits))
    if args.picture is not None:
        draw(args.picture, model, images, truths, min(args.taus, default=None))
        if calibration:
            draw_reliability(args.picture.with_stem(f"{args.picture.stem}-reliability"), calibration)
    timing.write_json(__file__, argv, args, info, results=results, ratios=ratios, calibration=calibration)


def read(args: argparse.Namespace) -> tuple[Anytime, list[Tensor], list[NDArray[np.int16]]]:
    """The model, its images, normalised, and their classes; none without --data."""
    if args.model is None or args.data is None:
        encoder = make_encoder(VARIANTS[args.variant])
        model = build_segmenter(encoder, "anytime", 3) if args.model is None else read_segmenter(args.model)[0]
        images = [torch.randn(1, model.encoder.in_chans, args.size, args.size) for _ in range(args.images)]
        truths: list[NDArray[np.int16]] = []
    else:
        model, weights, record = read_segmenter(args.model)
        normalize = weights.reading(str(args.model)).normalize
        pictures, maps = find_mapped(args.data, None, key="--data")
        images, truths = [], []
        for i in range(len(pictures)):
            with pictures.open(i) as file, maps.open(i) as map_file:
                raster, labels = (
                    Raster(file, model.encoder.in_chans, normalize.mean.flatten().tolist()),
                    LabelMap(map_file),
                )
                box = (0, 0, raster.height, raster.width)
                images.append(normalize(torch.from_numpy(raster.read(box))[None]))
                truths.append(record.classes.numbers(labels.read(box), maps.name(i)))
    if not isinstance(model, Anytime):
        raise SystemExit(f"--model {args.model}: give a model that was trained with model.head anytime")
    return model, images, truths


def sides(model: Anytime, args: argparse.Namespace) -> dict[str, Run]:
    """What is timed, by name."""

    def dense(image: Tensor) -> Tensor:
        each = [head(f) for head, f in zip(model.head, model.encoder.pyramid(image), strict=True)]
        return resized(reduce(add_nearest, each).permute(0, 3, 1, 2), image.shape[2:])

    def stopped(after: int) -> Run:
        def run(image: Tensor) -> Tensor:
            for _, answer in zip(range(after), model.anytime(image, tau=1.0), strict=False):
                last = answer
            return last.pixels()

        return run

    def confident(tau: float) -> Run:
        return lambda image: model.within(image, tau=tau)

    def budgeted(budget: float) -> Run:
        return lambda image: model.within(image, budget=budget)

    num = len(model.head)
    return {
        "dense": dense,
        "full": stopped(num),
        **{f"exit-{after}": stopped(after) for after in range(1, num)},
        **{f"tau-{tau:g}": confident(tau) for tau in args.taus},
        **{f"budget-{budget:g}": budgeted(budget) for budget in args.budgets},
    }


def multiply_adds(step: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) / 2


@torch.no_grad()
def scored(run: Run, images: Sequence[Tensor], truths: Sequence[NDArray[np.int16]]) -> dict[str, float]:
    """Mean IoU and pixel accuracy of the images; nothing without their classes."""
    if not truths:
        return {}
    scores = Scores(run(images[0]).shape[1])
    for image, truth in zip(images, truths, strict=True):
        scores.add([(run(image).float().softmax(1)[0].cpu().numpy(), truth)])
    found = scores.values([str(i) for i in range(len(scores.confusion))])
    return {name: found[name] for name in ("miou", "pixel_accuracy", "boundary_f1")}


def reliability(model: Anytime, images: Sequence[Tensor], truths: Sequence[NDArray[np.int16]]) -> list[dict[str, Any]]:
    """Of each exit with nothing hidden: how often pixels are right, by the probability of their class.

    Returns for each exit the expected calibration error, the share of pixels that are right, and of each of BINS bins
    of the probability the number of pixels, the sum of their probabilities, and how many are right.
    """
    sums = np.zeros((len(model.head), 3, BINS))
    for image, truth in zip(images, truths, strict=True):
        known = truth != IGNORED
        for total, answer in zip(sums, model.anytime(image, tau=1.0), strict=True):
            sure, predicted = answer.pixels().float().softmax(1)[0].max(0)
            values = sure.cpu().numpy()[known].astype(np.float64)
            right = predicted.cpu().numpy()[known] == truth[known]
            bins = np.minimum((values * BINS).astype(int), BINS - 1)
            for row, weights in zip(total, (None, values, right), strict=True):
                row += np.bincount(bins, weights, BINS)
    found = []
    for count, confidence, right in sums:
        ece, accuracy = float(np.abs(confidence - right).sum() / count.sum()), float(right.sum() / count.sum())
        bins_of = {"count": count.tolist(), "confidence": confidence.tolist(), "right": right.tolist()}
        found.append({"ece": ece, "accuracy": accuracy, **bins_of})
    return found


def draw_reliability(path: Path, calibration: Sequence[dict[str, Any]]) -> None:
    """A reliability diagram of each exit: accuracy over confidence; the diagonal is perfect."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for i, each in enumerate(calibration, 1):
        count, confidence, right = (np.array(each[name]) for name in ("count", "confidence", "right"))
        kept = count > 0
        axis.plot(
            confidence[kept] / count[kept],
            right[kept] / count[kept],
            marker=".",
            label=f"exit {i}, ECE {each['ece']:.3f}",
        )
    axis.set_xlabel("probability of the predicted class")
    axis.set_ylabel("share of pixels that are right")
    axis.legend()
    save_figure(figure, path)


def draw(
    path: Path, model: Anytime, images: Sequence[Tensor], truths: Sequence[NDArray[np.int16]], tau: float | None
) -> None:
    """Some images, what is known after the first exit, its confidence, and how far each patch was computed."""
    from matplotlib.figure import Figure

    opened = [int(sum(answer.computed.sum() for answer in model.anytime(image, tau))) for image in images]
    chosen = [int(i) for i in np.argsort(opened)][len(opened) // 2 :]  # the harder half
    chosen = [chosen[i] for i in evenly(len(chosen), SHOWN)]
    names = ["image", "true", "after stage 1", "confidence then", "stages computed", "last answer"]
    names = names if truths else [name for name in names if name != "true"]
    figure = Figure(figsize=(2 * len(names), 2 * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), len(names), squeeze=False)
    for row, i in zip(axes, chosen, strict=True):
        answers = list(model.anytime(images[i], tau))
        low, high = float(images[i].min()), float(images[i].max())
        picture = displayable(images[i][0], low - 1e-3, high)  # normalised values are not shown as 0..1
        first, last = (answer.pixels()[0].argmax(0).cpu().numpy() for answer in (answers[0], answers[-1]))
        depth = sum(answer.computed[0].int() for answer in answers)
        shown: dict[str, Any] = {
            "image": picture,
            "true": overlay(picture, truths[i]) if truths else None,
            "after stage 1": overlay(picture, first),
            "confidence then": answers[0].confidence[0].cpu().numpy(),
            "stages computed": torch.as_tensor(depth).cpu().numpy(),
            "last answer": overlay(picture, last),
        }
        limits = {"confidence then": (0, 1), "stages computed": (1, len(model.head))}
        for axis, name in zip(row, names, strict=True):
            least, most = limits.get(name, (0, 1))
            axis.imshow(shown[name], vmin=least, vmax=most, interpolation="nearest")
            axis.set_axis_off()
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    save_figure(figure, path)


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=9)
    found.add_argument("--model", type=Path, metavar="RUN", help="of segment, with model.head anytime")
    found.add_argument("--against", type=Path, metavar="RUN", help="of segment, with any head")
    found.add_argument("--data", metavar="CSV", help="images and maps, with the columns image,mask")
    found.add_argument("--images", type=int, default=8, help="that are timed; all are scored")
    found.add_argument("--taus", nargs="*", type=float, default=[0.998, 0.99, 0.95, 0.9], metavar="TAU")
    found.add_argument("--budgets", nargs="*", type=float, default=[0.5, 0.25, 0.1], metavar="SHARE")
    found.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw what was computed at the least tau, and a reliability diagram"
    )
    return found


if __name__ == "__main__":
    main()
