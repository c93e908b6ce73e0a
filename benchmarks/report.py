"""Write docs/benchmarks.md, and the figures in it, from the JSON files that the benchmarks wrote.

    python benchmarks/report.py

The page is a function of those files alone. A benchmark whose file is missing is a target that was not measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anytime
import first_hour
import numpy as np
from timing import ratio

from fcmae.atomic import replacing, write_text
from fcmae.tables import table

DOCS = Path(__file__).parents[1] / "docs"
GPU_EPOCHS = "800 epochs of ImageNet-1k"
LINEAR = 0.99  # R^2 from which a sweep counts as linear

Json = dict[str, Any]
Value = tuple[float, float | None, float | None]  # a figure and its quartiles, where it has any


class Target(NamedTuple):
    """A row of the table of targets. limit: the least value if it is an advantage, else the greatest."""

    what: str
    against: str
    file: str
    measure: Callable[[Json], Value | None]
    limit: float
    at_least: bool = True
    unit: str = "x"

    def row(self, results: dict[str, Json]) -> list[str]:
        found = self.measure(results[self.file]) if self.file in results else None
        goal = f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"
        if found is None:
            return [self.what, self.against, goal, "not measured", ""]
        value, low, high = found
        met = value >= self.limit if self.at_least else value <= self.limit
        digits = 2 if self.unit else 4
        spread = "" if low is None or high is None else f" ({low:.{digits}f} - {high:.{digits}f})"
        return [
            self.what,
            self.against,
            goal,
            f"{value:.{digits}f}{self.unit}{spread}",
            "met" if met else "**not met**",
        ]


def slower(side: str, *, inverse: bool = False) -> Callable[[Json], Value | None]:
    """How many times the first side's time the side takes; or the inverse, the first's as a share of this one's."""

    def measure(result: Json) -> Value | None:
        if side not in result["ratios"]:
            return None
        time, (low, high) = result["ratios"][side]["time"], result["ratios"][side]["quartiles"]
        return (1 / time, 1 / high, 1 / low) if inverse else (time, low, high)

    return measure


def share_of_saved(side: str) -> Callable[[Json], Value | None]:
    """Packed's saved activations as a share of the side's: counted, so without a spread."""

    def measure(result: Json) -> Value | None:
        sides = result["results"]
        return (sides["packed"]["saved_bytes"] / sides[side]["saved_bytes"], None, None) if side in sides else None

    return measure


def straightness(sweep: str) -> Callable[[Json], Value | None]:
    """The smaller R^2 of the packed encoder and of the whole model with its loss."""
    return lambda result: (min(result["sweeps"][sweep][curve]["r2"] for curve in ("packed", "whole model")), None, None)


def pipeline(size: str, loader: str) -> Callable[[Json], Value | None]:
    """How many times the images a second of torchvision, which come normalised in float32."""

    def measure(result: Json) -> Value | None:
        if size not in result["pipeline"]:
            return None
        speedup = result["pipeline"][size]["loaders"][loader]["speedup"]
        return speedup["time"], *speedup["quartiles"]

    return measure


def as_good(result: Json) -> str | None:
    """The fastest side, of the model that may stop, that is as good as the whole network, or that network itself."""
    if "same_accuracy" not in result:
        return None
    same: dict[str, str] = result["same_accuracy"]
    own = [name for name in same.values() if not name.startswith("against")]
    return min(["dense", *own], key=lambda name: float(result["results"][name]["median_s"]))


def time_as_good(result: Json) -> Value | None:
    name = as_good(result)
    return None if name is None else slower(name)(result)


def counted_as_good(result: Json) -> Value | None:
    """How far the share of the multiply-adds that it saves is from that of the time, as a share of the latter."""
    name, sides = as_good(result), result["results"]
    if name is None:
        return None
    time = result["ratios"][name]["time"]
    counted = sides[name]["multiply_adds"] / sides["dense"]["multiply_adds"]
    return abs(time - counted) / (1 - time) if time < 1 else math.inf, None, None


def gpu_step(part: str, side: str) -> Callable[[Json], Value | None]:
    """How many times the time of packed or triton, whichever is faster, the side takes on a GPU."""

    def measure(result: Json) -> Value | None:
        sides = result["parts"].get(part, {}).get("results", {})
        ours = [sides[name]["seconds"] for name in ("packed", "triton") if name in sides]
        if side not in sides or not ours:
            return None
        found = ratio(sides[side]["seconds"], min(ours, key=np.median))
        return found["time"], *found["quartiles"]

    return measure


def bandwidth(precision: str) -> Callable[[Json], Value | None]:
    """The least share of a copy's speed that the depthwise kernels reach, of all stages, forward and backward."""

    def measure(result: Json) -> Value | None:
        stages = result["parts"].get("depthwise", {}).get("stages", {}).get(precision, {}).values()
        shares = [share for found in stages for share in found.get("kernels", {}).get("share", {}).values()]
        return (min(shares), None, None) if shares else None

    return measure


ENCODER = "encoder forward + backward, {}, 224 px, ratio .6"
SAVED = "activations saved for backward, encoder, {}, ratio .6"
STEP = "whole step, atto, batch 16, ratio .6"
GPU = "whole step, base, 224 px, ratio .6, GPU, bf16, {}"
TARGETS = [
    Target(ENCODER.format("atto"), "masked", "encoder-atto", slower("masked"), 2.3),
    Target(ENCODER.format("tiny"), "masked", "encoder-tiny", slower("masked"), 2.55),
    Target(ENCODER.format("base"), "masked", "encoder-base", slower("masked"), 2.55),
    Target(STEP, "minkowski, our backend", "step", slower("minkowski"), 6),
    Target(STEP, "MinkowskiEngine's own depthwise convolution", "step", slower("engine"), 6),
    Target(SAVED.format("atto"), "masked", "encoder-atto", share_of_saved("masked"), 0.42, False),
    Target(SAVED.format("tiny"), "masked", "encoder-tiny", share_of_saved("masked"), 0.42, False),
    Target(SAVED.format("base"), "masked", "encoder-base", share_of_saved("masked"), 0.42, False),
    Target(
        "whole step, atto, 48 of 49 patches visible: its time",
        "timm, forward + backward, no optimizer",
        "step-dense",
        slower("timm-gradients", inverse=True),
        1.1,
        False,
    ),
    Target(
        "fine-tuning step, atto, 128 px, batch 32: its time",
        "timm, same weights, whole step",
        "finetune",
        slower("timm", inverse=True),
        1,
        False,
    ),
    *(
        Target(
            f"cost grows linearly with the {sweep}: R^2",
            "a straight line",
            "scaling",
            straightness(sweep),
            LINEAR,
            unit="",
        )
        for sweep in ("images", "resolution", "visible share")
    ),
    *(
        Target(
            f"input pipeline, JPEG {size} to 224, {what}",
            "torchvision ImageFolder",
            "input_pipeline",
            pipeline(size, loader),
            limit,
        )
        for size, limit in (("500x375", 2), ("2000x1500", 5))
        for what, loader in (("bytes out", "fcmae"), ("normalised on the same core", "fcmae, and normalised"))
    ),
    Target(
        "anytime segmentation, random weights, nothing hidden: its time",
        "the dense network",
        "anytime",
        slower("full"),
        1.05,
        False,
    ),
    Target(
        "anytime segmentation of sea, land and lakes, nothing hidden: its time",
        "the dense network",
        "anytime_landsea",
        slower("full"),
        1.05,
        False,
    ),
    Target(
        f"anytime, fastest side within {anytime.POINTS} points of mean IoU: its time",
        "the dense network",
        "anytime_landsea",
        time_as_good,
        0.6,
        False,
    ),
    Target(
        "the same side: share of multiply-adds saved, beyond that of time",
        "share of time saved",
        "anytime_landsea",
        counted_as_good,
        0.1,
        False,
    ),
    *(
        Target(GPU.format(how), against, "gpu", gpu_step(part, side), limit)
        for how, part in (("compiled", "base-compiled"), ("CUDA graphs", "base-cudagraphs"))
        for against, side, limit in (("masked", "masked", 2.2), ("timm's dense train step", "timm", 3))
    ),
    *(
        Target(f"depthwise kernels, base, GPU, {precision}: slowest stage", "a copy's bytes a second", "gpu", m, 0.6)
        for precision, m in ((precision, bandwidth(precision)) for precision in ("bf16", "fp32"))
    ),
]

TITLES = {
    "encoder-atto": "Encoder, atto",
    "encoder-tiny": "Encoder, tiny",
    "encoder-base": "Encoder, base",
    "encoder-dense": "Encoder, atto, nothing masked",
    "container-light": "Encoder, CONTAINER-LIGHT",
    "container": "Encoder, CONTAINER",
    "container-light-448": "Encoder, CONTAINER-LIGHT, 448 px",
    "pruned": "Features of atto, whole and pruned",
    "step": "Whole step, atto",
    "step-dense": "Whole step, atto, one patch of 49 masked",
    "finetune": "Fine-tuning step, atto",
    "anytime": "Anytime segmentation, random weights",
    "anytime_landsea": "Anytime segmentation of sea, land and lakes",
    "gpu": "On a GPU",
    "scaling": "Cost as the work grows",
    "input_pipeline": "Input pipeline, one core",
    "exported": "An ONNX file, atto's features",
    "first_hour": "The first command, on five folders",
}

HEAD = """# Benchmarks

Written by `benchmarks/report.py` from `docs/benchmarks/*.json`; `make bench` runs most of those of the CPU and writes
this page anew. Those of a GPU are `python benchmarks/gpu.py --out docs/benchmarks/gpu.json`{gpu};
on another card or version move that file away first.

{machines}

The sides of a comparison are timed in turn, repeat by repeat, in one process, in the same dtype and mode. A ratio is
that of the medians; in brackets, and where a table says quartiles, are the first and third quartile over the repeats.
[performance.md](performance.md#targets-that-are-not-met) explains what is not met, and what was met on one day and not
on another (base's encoder: 2.75 and 2.53). Rows of anytime segmentation are of one seed;
[three](segmentation.md#what-it-gives).

## Targets

{targets}

{figure}## What the columns are

*Saved for backward* is the bytes that autograd's saved-tensor hooks see in one forward pass, each storage once, without
parameters and inputs. *Peak memory* is the most that PyTorch's allocator holds during one step beyond what was there
before it: gradients are in it, parameters and AdamW's moments are not.

| side | what it is |
| --- | --- |
| `packed` | the default backend |
| `masked` | the definition: a dense network whose hidden sites are zeroed |
| `minkowski` | our backend on MinkowskiEngine, with a depthwise convolution of its own |
| `engine` | the same with MinkowskiEngine's MinkowskiChannelwiseConvolution |
| `timm` | timm's dense model on whole images, without a decoder; with AdamW where the step has it |
| `timm-gradients` | the same without AdamW |
| `fcmae` | our classifier on whole images, in the fine-tuning step |
| `whole`, `hidden-K`, `blocks-K` | all, a share K of each block's hidden channels, or K of each stage's blocks |
| `torch`, `onnxruntime` | our encoder on whole images, and the file that `fcmae export` writes of it |
| `dense`, `full` | a network with exits: every patch, the last answer alone; the anytime path with nothing hidden |
| `exit-K` | the same, stopped after stage K with nothing hidden |
| `tau-T`, `budget-B` | patches leave when they are surer than T; or the share B of them stays, the least sure |
| `against`, `against-exit-K` | another network, trained without masks: whole, and stopped after stage K |
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from docs/benchmarks/*.json.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder docs")
    docs: Path = parser.parse_args(argv).docs
    found = {path.stem: json.loads(path.read_text()) for path in sorted((docs / "benchmarks").glob("*.json"))}
    results = {name: found[name] for name in TITLES if name in found}
    bars, scaling = draw_bars(results, docs / "benchmarks.svg"), draw_scaling(results, docs / "scaling.svg")
    parts = [
        HEAD.format(
            gpu="" if "gpu" in results else ", which was not run",
            machines="\n".join(f"- {text}" for text in dict.fromkeys(map(machine, results.values()))),
            targets=table(
                ["", "against", "target", "measured", ""], (target.row(results) for target in TARGETS), left=2
            ),
            figure="![Milliseconds an image: medians, with quartiles](benchmarks.svg)\n\n" if bars else "",
        )
    ]
    several = len(set(map(machine, results.values()))) > 1
    for name, result in results.items():
        parts += [f"## {TITLES[name]}\n", f"```bash\n{result['command']}\n```\n"]
        repeats = "Once" if "runs" in result else f"{result['settings']['repeats']} repeats"
        on = f" On {machine(result)}." if several else ""
        parts += [f"{repeats}; load when it started: {result['machine']['load']}.{on}\n", *body(result)]
    if scaling:
        parts.append("![Time against images, resolution and visible share, with the fitted lines](scaling.svg)\n")
    write_text(docs / "benchmarks.md", "\n".join(parts))
    print(f"{docs / 'benchmarks.md'}: {len(results)} of {len(TITLES)} benchmarks")


def machine(result: Json) -> str:
    """The machine without its load, which differs from one benchmark to the next."""
    return ", ".join(f"{key} {value}" for key, value in result["machine"].items() if key != "load")


def body(result: Json) -> Iterator[str]:
    """A benchmark's tables."""
    if is_anytime(result):
        yield anytime.comparison(result["results"], result["ratios"]) + "\n"
        if (same := result.get("same_accuracy")) is not None:
            words = f"Of each kind the fastest side that loses at most {anytime.POINTS} points to the whole network:"
            yield f"{words}\n\n{anytime.at_same_accuracy(same, result['results'], result['ratios'])}\n"
    elif "results" in result:
        yield compared(result) + "\n"
    if "runs" in result:
        yield table(first_hour.COLUMNS, first_hour.rows(result["runs"]), left=2) + "\n"
        yield "A run should take at most a quarter more than its hours, and less than 4 GB.\n"
        if "note" in result:
            yield f"{result['note']}\n"
    if "sweeps" in result:
        yield swept(result["sweeps"]) + "\n"
    for size, found in result.get("pipeline", {}).items():
        yield f"JPEGs of {size}, {found['count']} at a time:\n"
        yield loaded(found["loaders"]) + "\n"
    for name, part in result.get("parts", {}).items():
        yield f"**{name}**: " + (" ".join(told(part)) or "done.") + "\n"
        if (command := part.get("command", result["command"])) != result["command"]:
            yield f"```bash\n{command}\n```\n"
        yield from (text + "\n" for text in gpu_tables(part))


# What a side's figures may hold besides its timings: the header, and how it is printed.
COUNTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "multiply_adds": ("multiply-adds, G", lambda count: f"{count / 1e9:.3f}"),
    "parameters": ("parameters, M", lambda count: f"{count / 1e6:.2f}"),
    "saved_bytes": ("saved for backward, MB", lambda count: f"{count / 1e6:.1f}"),
    "peak_bytes": ("peak memory, MB", lambda count: f"{count / 1e6:.1f}"),
}


def is_anytime(result: Json) -> bool:
    return "multiply_adds" in result.get("results", {}).get("dense", {})


def compared(result: Json) -> str:
    first, figures = next(iter(result["results"].items()))
    counts = {key: COUNTS[key] for key in COUNTS if key in figures}
    rows = []
    for name, side in result["results"].items():
        ratio = result["ratios"][name]
        rows.append(
            [
                name,
                f"{1000 * side['median_s']:.1f}",
                "{:.1f} - {:.1f}".format(*(1000 * value for value in side["quartiles_s"])),
                f"{ratio['time']:.2f}x",
                "{:.2f} - {:.2f}".format(*ratio["quartiles"]),
                *(shown(side[key]) for key, (_, shown) in counts.items()),
            ]
        )
    header = ["", "median, ms", "quartiles", f"time / {first}", "quartiles", *(title for title, _ in counts.values())]
    return table(header, rows)


def told(part: Json) -> Iterator[str]:
    """What a part of the GPU's says in sentences."""
    if "skipped" in part:
        yield f"left out: {part['skipped']}."
    for key, what in (("not_run", "not run"), ("no_triton", "without Triton")):
        if part.get(key):
            yield f"{what}: {part[key]}."
    for key, what in (("failed", "failed"), ("failed_again", "**Failed when it was tried again**")):
        if key in part:
            yield f"{what}: {part[key]}."
    for side, reason in part.get("left_out", {}).items():
        yield f"{side} left out: {reason}."
    if "batch" in part:
        yield f"{part['variant']}, batch {part['batch']}."
    if part.get("copy_bytes_per_s"):
        yield f"A copy moves {part['copy_bytes_per_s'] / 1e12:.2f} TB/s."
    if "data_wait_share" in part:
        yield (
            f"{part['images_per_s']:.0f} images/s, {100 * part['data_wait_share']:.1f} % of the time waiting for data "
            f"(JPEGs of {part['kb_per_file']:.0f} kB, made up, 64 different ones: its loss tells nothing), "
            f"{part['steps']} steps, backend {part['backend']}."
        )
    if "ok" in part:
        yield "All is right." if part["ok"] else "**Not all is right.**"


def gpu_tables(part: Json) -> Iterator[str]:
    if rows := part.get("rows"):
        header = [name for name in rows[0] if name not in ("ok", "worst")]
        cells = [[f"{v:.1e}" if isinstance(v := row[name], float) else str(v) for name in header] for row in rows]
        verdicts = ["ok" if row["ok"] else f"**wrong** {row.get('worst', '')}" for row in rows]
        yield table([*header, ""], ([*line, verdict] for line, verdict in zip(cells, verdicts, strict=True)), left=2)
    for precision, stages in part.get("stages", {}).items():
        lines = []
        for stage, ways in stages.items():
            for way, found in ways.items():
                shares = found.get("share", {})
                line = [f"{precision}, {stage}", way]
                for direction in ("forward", "backward"):
                    share = f"{100 * shares[direction]:.0f} %" if direction in shares else ""
                    line += [f"{1000 * found[direction]['median_s']:.2f}", share]
                lines.append(line)
        yield table(["", "", "forward, ms", "of a copy", "backward, ms", "of a copy"], lines, left=2)
    header = ["", "images/s", "median, ms", "quartiles", "peak memory, MB", f"hours of {GPU_EPOCHS}, steps alone"]
    if "results" in part:
        first, *_ = part["ratios"]
        times = ([f"{part['ratios'][side]['time']:.2f}x"] for side in part["results"])
        lines = [on_gpu(side, found) + time for (side, found), time in zip(part["results"].items(), times, strict=True)]
        yield table([*header, f"time / {first}"], lines)
    if "sizes" in part:
        lines = [on_gpu(f"{side}, {batch}", f) for side, sizes in part["sizes"].items() for batch, f in sizes.items()]
        yield table(header, lines)


def on_gpu(name: str, found: Json) -> list[str]:
    peak = found.get("peak_bytes")
    return [
        name,
        f"{found['images_per_s']:.0f}",
        f"{1000 * found['median_s']:.1f}",
        "{:.1f} - {:.1f}".format(*(1000 * value for value in found["quartiles_s"])),
        "" if peak is None else f"{peak / 1e6:.0f}",
        f"{found['hours']:.1f}",
    ]


def swept(sweeps: Json) -> str:
    rows = []
    for sweep, curves in sweeps.items():
        for curve, found in curves.items():
            ends = [found["points"][i]["median_s"] * 1000 for i in (0, -1)]
            line = [f"{found['r2']:.4f}", f"{100 * found['deviation']:.1f} %"]
            rows.append([f"{sweep}, {curve}", "{:.1f} - {:.1f}".format(*ends), *line])
    return table(["sweep", "first - last point, ms", "R^2", "largest deviation from the line"], rows)


def loaded(loaders: Json) -> str:
    rows = []
    for name, found in loaders.items():
        rows.append([name, f"{found['images_per_s']:.0f}", f"{found['speedup']['time']:.2f}x"])
        rows[-1].append("{:.2f} - {:.2f}".format(*found["speedup"]["quartiles"]))
    return table(["", "images/s", "speed / torchvision", "quartiles"], rows)


def comparisons(results: dict[str, Json]) -> Iterator[tuple[str, int, Json]]:
    """Title, images of one step, and the sides of every comparison."""
    for name, result in results.items():
        if "results" in result and not is_anytime(result):
            yield TITLES[name], result["settings"]["batch"], result["results"]
        for size, found in result.get("pipeline", {}).items():
            yield f"{TITLES[name]}, {size}", found["count"], found["loaders"]


def draw_bars(results: dict[str, Json], path: Path) -> bool:
    """Milliseconds an image, a panel a comparison. Returns whether there was anything to draw."""
    panels = list(comparisons(results))
    if not panels:
        return False
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2 * rows), layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flat[: len(panels)]
    for axes, (title, images, sides) in zip(places, panels, strict=True):
        medians = np.array([side["median_s"] for side in sides.values()])
        spread = np.array([side["quartiles_s"] for side in sides.values()]).T
        whiskers = np.abs(spread - medians)
        axes.barh(list(sides), 1000 / images * medians, xerr=1000 / images * whiskers, color="#3f7fbf", capsize=3)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="ms an image")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    save(figure, path)
    return True


def draw_scaling(results: dict[str, Json], path: Path) -> bool:
    """The sweeps, each with its fitted lines. Returns whether there was anything to draw."""
    if "scaling" not in results:
        return False
    from matplotlib.figure import Figure

    result = results["scaling"]
    settings = result["settings"]
    labels = {
        "images": f"images of {settings['size']} px",
        "resolution": f"visible patches an image, {min(settings['sizes'])} to {max(settings['sizes'])} px",
        "visible share": "share of the patches that is visible",
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    colors = {"packed": "#3f7fbf", "whole model": "#5a9a6e", "masked": "#c65d3b"}
    for axes, (sweep, curves) in zip(figure.subplots(1, 3), result["sweeps"].items(), strict=True):
        for curve, found in curves.items():
            x = np.array(found["x"])
            axes.plot(x, 1000 * (found["slope"] * x + found["intercept"]), color=colors[curve], linewidth=1)
            points = [1000 * point["median_s"] for point in found["points"]]
            whiskers = np.abs(1000 * np.array([p["quartiles_s"] for p in found["points"]]).T - points)
            label = f"{curve}, R² {found['r2']:.4f}"
            axes.errorbar(x, points, whiskers, fmt="o", color=colors[curve], markersize=4, capsize=2, label=label)
        axes.set(xlabel=labels[sweep], ylabel="ms, forward + backward", xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize="small")
    save(figure, path)
    return True


def save(figure: Any, path: Path) -> None:
    """As SVG, the same bytes each time. The page behind it may be dark, so the card is opaque, as matplotlib has it."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fcmae", "svg.fonttype": "none"}), replacing(path) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
