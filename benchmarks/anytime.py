"""Time a segmentation that may stop, against the dense network, at the accuracy that each reaches.

    python benchmarks/anytime.py --model runs/anytime --data runs/landsea/test.csv --picture anytime.png
    python benchmarks/anytime.py --model runs/anytime --against runs/pyramid --data runs/landsea/test.csv
    python benchmarks/anytime.py --variant convnextv2_atto --size 512        # random weights: time alone, by budgets

dense computes every patch at every stage and the last answer alone; full is the anytime path with nothing hidden;
exit-K stops after stage K, whole; tau-T and budget-B are what their names say; against is another model, whole, and
against-exit-K is that one stopped, if it has exits: trained with model.tau 1, those of a network that saw no masks.
Images are seen one at a time, whole. Sides take turns within each repeat, and ratios are to dense. Multiply-adds are
those that torch's operations executed: the depthwise convolution's on all of the map, or by the loop in C on visible
sites. Of each kind the fastest side is named that loses no more than POINTS to the better of dense and against. Speed
is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fcmae.anytime import Anytime, build_segmenter
from fcmae.data.find import find_mapped
from fcmae.data.maps import IGNORED
from fcmae.data.rasters import LabelMap, Raster
from fcmae.data.split import evenly
from fcmae.evaluation.pictures import displayable, new_figure, save_figure
from fcmae.heads import add_nearest, resize
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS
from fcmae.segmentation import Scores, overlay
from fcmae.tables import table
from fcmae.weights.segmenters import read_segmenter

Run = Callable[[Tensor], Tensor]  # (1, C, H, W) normalised to logits of every pixel
BINS = 15  # of probabilities, in a reliability diagram
SHOWN = 3  # images of a picture
POINTS = 0.3  # of mean IoU, in per cent, that count as the same accuracy
KINDS = {"stopped after a stage": "exit-", "tau": "tau-", "budget": "budget-", "against, stopped": "against-exit-"}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    timing.check_repeats(args)
    if args.compile:
        raise SystemExit("--compile: stages are computed one by one, and none of them compiled: leave it out")
    torch.manual_seed(0)
    device = torch.device(args.device)
    info = timing.machine(device)
    model, images, truths = read(args)
    model = model.to(device).eval()
    images = [image.to(device) for image in images]
    runs = sides(model, args)
    if args.against is not None:
        if args.model is None:
            raise SystemExit("--against: there is nothing to compare without --model")
        runs |= others(args.against, args.model, device)
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
        with timing.autocast(args):
            results[name] = {**per_image, "multiply_adds": macs, **scored(run, images, truths)}
    ratios = {name: timing.ratio(each, seconds["dense"]) for name, each in seconds.items()}
    print("\n" + comparison(results, ratios))
    same = same_accuracy(results) if truths else None
    if same is not None:
        print("\n" + at_same_accuracy(same, results, ratios))
    calibration = []
    if truths:
        with timing.autocast(args):
            calibration = reliability(model, images, truths)
        exits = [
            [str(i), f"{each['ece']:.4f}", f"{100 * each['accuracy']:.2f}"] for i, each in enumerate(calibration, 1)
        ]
        print("\n" + table(["exit", "ECE", "pixels right, %"], exits))
    if args.picture is not None:
        draw(args.picture, model, images, truths, min(args.taus, default=None))
        if truths:
            draw_curve(args.picture.with_stem(f"{args.picture.stem}-curve"), results)
            draw_reliability(args.picture.with_stem(f"{args.picture.stem}-reliability"), calibration)
    found = {"results": results, "ratios": ratios, "calibration": calibration}
    timing.write_json(__file__, argv, args, info, **found, **({} if same is None else {"same_accuracy": same}))


def comparison(results: Mapping[str, Any], ratios: Mapping[str, Any]) -> str:
    """The table of all sides."""
    header = ["", "an image, ms", "time / dense", "quartiles", "multiply-adds, M", "/ dense", "mean IoU, %"]
    return table(header, [row(name, results, ratios) for name in results])


def at_same_accuracy(same: Mapping[str, str], results: Mapping[str, Any], ratios: Mapping[str, Any]) -> str:
    """The table of `same_accuracy`."""
    header = ["kind", "fastest", "an image, ms", "time / dense", "quartiles", "multiply-adds, M", "/ dense"]
    none = [f"none within {POINTS} points", *[""] * 6]
    rows = [[kind, *(row(same[kind], results, ratios) if kind in same else none)] for kind in _kinds(results)]
    return table([*header, "mean IoU, %"], rows, left=2)


def row(name: str, results: Mapping[str, Any], ratios: Mapping[str, Any]) -> list[str]:
    found = results[name]
    return [
        name,
        f"{1000 * found['median_s']:.1f}",
        f"{ratios[name]['time']:.2f}",
        "{:.2f} - {:.2f}".format(*ratios[name]["quartiles"]),
        f"{found['multiply_adds'] / 1e6:.0f}",
        f"{found['multiply_adds'] / results['dense']['multiply_adds']:.2f}",
        f"{100 * found['miou']:.2f}" if "miou" in found else "",
    ]


def same_accuracy(results: Mapping[str, Any]) -> dict[str, str]:
    """Of each of KINDS the fastest side that loses at most POINTS to the better of the whole networks, if any does."""
    bar = max(results[name]["miou"] for name in ("dense", "against") if name in results) - POINTS / 100
    good = {kind: [name for name in names if results[name]["miou"] >= bar] for kind, names in _kinds(results).items()}
    return {kind: min(names, key=lambda name: results[name]["median_s"]) for kind, names in good.items() if names}


def _kinds(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """The sides of each of KINDS that has any."""
    found = {kind: [name for name in results if name.startswith(prefix)] for kind, prefix in KINDS.items()}
    return {kind: names for kind, names in found.items() if names}


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
                pixels = raster.read(box)
                images.append(normalize(torch.from_numpy(pixels.values)[None]))
                truths.append(record.classes.numbers(labels.read(box), maps.name(i), pixels.is_seen))
    if not isinstance(model, Anytime):
        raise SystemExit(f"--model {args.model}: give a model that was trained with model.head anytime")
    return model, images, truths


def sides(model: Anytime, args: argparse.Namespace) -> dict[str, Run]:
    """What is timed, by name."""

    num = len(model.head)
    return {
        "dense": whole(model),
        "full": stopped(model, num),
        **{f"exit-{after}": stopped(model, after) for after in range(1, num)},
        # Exits that were not trained are sure of nothing.
        **{f"tau-{tau:g}": partial(model.within, tau=tau) for tau in args.taus if args.model is not None},
        **{f"budget-{budget:g}": partial(model.within, budget=budget) for budget in args.budgets},
    }


def whole(model: Anytime) -> Run:
    """The dense network: every patch at every stage, and the last answer alone."""

    def run(image: Tensor) -> Tensor:
        each = [head(f) for head, f in zip(model.head, model.encoder.pyramid(image), strict=True)]
        return resize(reduce(add_nearest, each).permute(0, 3, 1, 2), image.shape[2:])

    return run


def stopped(model: Anytime, after: int) -> Run:
    """The anytime path with nothing hidden, until this stage."""

    def run(image: Tensor) -> Tensor:
        *_, last = islice(model.anytime(image, tau=1.0), after)
        return last.pixels()

    return run


def others(path: Path, ours: Path, device: torch.device) -> dict[str, Run]:
    """Another model, whole; and stopped after each stage but the last, if it has exits."""
    (model, weights, record), (_, own, own_record) = read_segmenter(path), read_segmenter(ours)
    mean, own_mean = (each.reading("").normalize.mean for each in (weights, own))
    if record.classes != own_record.classes or not torch.equal(mean, own_mean):
        raise SystemExit(f"--against {path}: its classes or the mean of its images are not those of --model {ours}")
    model = model.to(device).eval()
    if not isinstance(model, Anytime):
        return {"against": model.forward}
    return {
        "against": whole(model),
        **{f"against-exit-{after}": stopped(model, after) for after in range(1, len(model.head))},
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
    figure = new_figure(5, 4)
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


def draw_curve(path: Path, results: Mapping[str, Any]) -> None:
    """Mean IoU over milliseconds and over multiply-adds, a curve a kind; stopping ends in the whole network."""
    ends = {"exit-": "dense", "against-exit-": "against"}
    curves = {kind: [*names, *filter(None, [ends.get(KINDS[kind])])] for kind, names in _kinds(results).items()}
    if "against" in results and "against-exit-1" not in results:
        curves["against"] = ["against"]
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, names in curves.items():
        sides = sorted((results[name] for name in names), key=lambda side: float(side["median_s"]))
        miou = [100 * side["miou"] for side in sides]
        middle = np.array([1000 * side["median_s"] for side in sides])
        whiskers = np.abs(1000 * np.array([side["quartiles_s"] for side in sides]).T - middle)
        left.errorbar(middle, miou, xerr=whiskers, marker="o", markersize=4, capsize=2, label=kind)
        right.plot([side["multiply_adds"] / 1e6 for side in sides], miou, marker="o", markersize=4, label=kind)
    left.set(xlabel="ms an image", ylabel="mean IoU, %", xlim=(0, None))
    right.set(xlabel="multiply-adds of an image, M", xlim=(0, None))
    left.legend(fontsize="small")
    save_figure(figure, path)


def draw(
    path: Path, model: Anytime, images: Sequence[Tensor], truths: Sequence[NDArray[np.int16]], tau: float | None
) -> None:
    """Some images, what is known after the first exit, its confidence, and how far each patch was computed."""
    opened = [int(sum(answer.computed.sum() for answer in model.anytime(image, tau))) for image in images]
    chosen = [int(i) for i in np.argsort(opened)][len(opened) // 2 :]  # the harder half
    chosen = [chosen[i] for i in evenly(len(chosen), SHOWN)]
    names = ["image", "true", "after stage 1", "confidence then", "stages computed", "last answer"]
    names = names if truths else [name for name in names if name != "true"]
    figure = new_figure(2 * len(names), 2 * len(chosen) + 0.5)
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
        "--picture",
        type=Path,
        metavar="PNG",
        help="draw what was computed at the least tau; beside it NAME-curve.png and NAME-reliability.png",
    )
    found.set_defaults(batch=1)
    return found


if __name__ == "__main__":
    main()
