"""Write docs/results.md and its figures from docs/results/*.json, which studies/collect.py writes.

    python studies/results.py

The page is a function of these files, and of docs/results/SCALE.md, our reading of the numbers; and of the pages of the
other networks, whose studies write their ends. What was not run is not shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import labels
import numpy as np
import small_images
from study import CONTROLS, K, half_width, in_words, of_probe, percent_of, save

from fcmae.evaluation import paired
from fcmae.evaluation.probes import mean_and_interval
from fcmae.tables import table

DOCS = Path(__file__).parents[1] / "docs"
Json = dict[str, Any]
METRICS = {"tiny20": ("top1",), "solar": ("auroc", "balanced_accuracy")}
TITLES = {"top1": "top-1", "auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}


def number(values: Sequence[float]) -> str:
    """Mean, and its 95 % interval where there are several."""
    mean, interval = mean_and_interval(values)
    return f"{100 * mean:.1f}" if interval is None else f"{100 * mean:.1f} ± {100 * (interval[1] - mean):.1f}"


def seeds_of(scores: Json, prefix: str) -> dict[int, Json]:
    """Scores by seed of the runs named PREFIX-SEED."""
    return {int(name.rpartition("-")[2]): found for name, found in scores.items() if name.rpartition("-")[0] == prefix}


def budgets(results: Json) -> Iterator[str]:
    """Pretrained against scratch, by share of the labels."""
    for data, metrics in METRICS.items():
        for metric in metrics:
            rows = []
            for percent in (1, 10, 100):
                starts = {
                    s: seeds_of(results["scores"], f"tune-{data}-{percent}-{s}") for s in ("pretrained", "scratch")
                }
                seeds = sorted(set(starts["pretrained"]) & set(starts["scratch"]))
                if not seeds:
                    continue
                values = {s: [found[seed][metric] for seed in seeds] for s, found in starts.items()}
                gains = [a - b for a, b in zip(values["pretrained"], values["scratch"], strict=True)]
                steps = starts["scratch"][seeds[0]]["steps"]
                cells = [number(values["pretrained"]), number(values["scratch"]), number(gains), paired.tell(gains)]
                rows.append([f"{percent} %", str(steps), str(len(seeds)), *cells])
            if rows:
                header = ["labels", "steps", "seeds", "pretrained", "scratch", "difference, of each seed", ""]
                yield f"**{data}**, {TITLES[metric]} in %:\n\n{table(header, rows)}"


def frozen(results: Json) -> Iterator[str]:
    """Probes on frozen features: pretrained, random, pixels."""
    for data, metrics in METRICS.items():
        rows = []
        plain = {name: label for name, (_, label) in CONTROLS.items()}
        encoders = ((f"main-{data}-v2", "pretrained"), (f"{data}-random", "random weights"))
        for name, label in (*encoders, *((f"{data}-{name}", label) for name, label in plain.items())):
            found = results["probes"].get(name)
            if found is None:
                continue
            for stage in sorted({result.get("stage") or 0 for result in found}):
                cells = [
                    percent_of(of_probe(found, probe, metric, stage or None))
                    for probe in ("knn", "linear")
                    for metric in metrics
                ]
                rows.append([f"{label}, stage {stage}" if stage else label, *cells])
        if rows:
            header = [f"{probe}, {TITLES[m]}" for probe in (f"kNN, k = {K}", "linear") for m in metrics]
            yield f"**{data}**, in %, all labels:\n\n{table(['features', *header], rows)}"
        rows = []
        for name, label in {"v2": "pretrained", "random": "random weights", **plain}.items():
            for result in results["probes"].get(f"few-{data}-{name}", []):
                spreads = [half_width(result, metric) for metric in metrics]
                rows.append([f"{label}, {result['setting']['labels']}", str(result["setting"]["draws"]), *spreads])
        if rows:
            header = ["features, labels", "draws", *(f"linear, {TITLES[metric]}" for metric in metrics)]
            yield f"**{data}**, in %, few labels, stage 4:\n\n{table(header, rows)}"


WITH_GRN = "tune-tiny20-10-pretrained"
GRN = (
    (WITH_GRN, "V2, GRN in both", "main-tiny20-v2"),
    ("grn-none", "V2 without GRN in either", "main-tiny20-no-grn"),
    ("grn-dropped", "V2, GRN dropped at fine-tuning", "main-tiny20-v2"),
    ("grn-new", "V2, GRN new at fine-tuning", "main-tiny20-v2"),
    ("grn-v1", "V1 (LayerScale)", "main-tiny20-v1"),
)


def grn(results: Json) -> Iterator[str]:
    rows = []
    base = seeds_of(results["scores"], WITH_GRN)
    for prefix, label, pretrained in GRN:
        found = seeds_of(results["scores"], prefix)
        if not found:
            continue
        seeds = sorted(set(found) & set(base))
        gains = [found[seed]["top1"] - base[seed]["top1"] for seed in seeds]
        losses = results["curves"].get(pretrained, {}).get("val_loss") or [[0, None]]
        loss = "" if losses[-1][1] is None else f"{losses[-1][1]:.4f}"
        compared = ["", ""] if prefix == WITH_GRN or not gains else [number(gains), paired.tell(gains)]
        probe = results["probes"].get(pretrained, []) if prefix not in ("grn-dropped", "grn-new") else []
        linear = percent_of(of_probe(probe, "linear", "top1", 4))
        rows.append([label, loss, linear, number([f["top1"] for f in found.values()]), str(len(found)), *compared])
    if rows:
        header = [
            "",
            "validation loss",
            "linear, top-1",
            "fine-tuned with 10 % of the labels, top-1",
            "seeds",
            "against the first, of each seed",
            "",
        ]
        yield table(header, rows)


def varied(results: Json) -> Iterator[str]:
    """What changes with one thing of pretraining."""
    names = [(f"short-ratio-{ratio}", f"mask ratio {ratio}") for ratio in ("0.3", "0.6", "0.75", "0.9")]
    names += [("short-depth-2", "decoder of 2 blocks"), ("short-dense", "dense encoder, not masked inside")]
    rows = []
    for name, label in names:
        if name in results["curves"]:
            probes = results["probes"].get(name, [])
            cells = [percent_of(of_probe(probes, probe, "top1", 4)) for probe in ("knn", "linear")]
            rows.append([label, f"{results['curves'][name]['val_loss'][-1][1]:.4f}", *cells])
    if rows:
        yield table(["", "validation loss", f"kNN, k = {K}, top-1", "linear, top-1"], rows)


def distances(results: Json) -> Iterator[str]:
    """Mean cosine distance over the layers of each stage, at the first and the last checkpoint."""
    rows = []
    for name, label in (("v2", "V2"), ("no-grn", "V2 without GRN"), ("v1", "V1")):
        for step, layers in list(results["time"].get(name, {}).items())[
            :: max(1, len(results["time"].get(name, {})) - 1)
        ]:
            stages = [[v for layer, v in layers.items() if layer.startswith(f"stages.{i}.")] for i in range(4)]
            rows.append([f"{label}, step {step}", *(f"{np.mean(values):.3f}" for values in stages)])
    if rows:
        yield table(["", "stage 1", "stage 2", "stage 3", "stage 4"], rows)


def losses(results: Json) -> Iterator[str]:
    rows = []
    for name, found in results["curves"].items():
        if found["val_loss"]:
            last = found["val_loss"][-1]
            rows.append([f"`{name}`", f"{last[0]:.1f}", f"{found['loss'][-1][1]:.3f}", f"{last[1]:.3f}"])
    if rows:
        yield table(["run", "epochs", "training loss", "validation loss"], rows)


def commands(results: Json) -> str:
    lines = []
    for name, job in results["jobs"].items():
        if not name.startswith(("tune", "grn")) or name.endswith("-0"):
            lines.append(f"# {name}: {job['seconds'] / 60:.1f} minutes\n{job['command']}")
    return "\n".join(lines)


def draw(results: Json, folder: Path) -> dict[str, str]:
    """Figures by section; each an SVG file below `folder`."""
    from matplotlib.figure import Figure

    scale, made = results["scale"], {}
    curves = results["curves"]
    if curves:
        groups = {
            "tiny20": [n for n in curves if n.startswith("main-tiny20")],
            "tiny20, one thing varied": [n for n in curves if n.startswith("short")],
            "solar, and the shipped configurations": [n for n in curves if n.startswith(("main-solar", "curve"))],
        }
        figure = Figure(figsize=(13, 4), layout="constrained")
        for axis, (title, names) in zip(figure.subplots(1, 3), groups.items(), strict=True):
            for name in names:
                line = axis.plot(*np.array(curves[name]["loss"]).T, linewidth=1, label=name.partition("-")[2])[0]
                if curves[name]["val_loss"]:
                    axis.plot(*np.array(curves[name]["val_loss"]).T, "o", markersize=3, color=line.get_color())
            axis.set(title=f"{title} (dots: validation)", xlabel="epoch", ylabel="loss", ylim=(None, 1.1))
            if names:
                axis.legend(fontsize="small")
        save(figure, folder / f"{scale}-loss.svg")
        made["loss"] = f"![Loss against epochs](results/{scale}-loss.svg)\n"
    time = {name: found for name, found in results["time"].items() if found}
    if time:
        figure = Figure(figsize=(4.5 * len(time), 4), layout="constrained")
        panels = figure.subplots(1, len(time), squeeze=False)[0]
        for axis, (name, found) in zip(panels, time.items(), strict=True):
            values = np.array([list(layers.values()) for layers in found.values()]).T  # (layers, steps)
            image = axis.imshow(values, aspect="auto", vmin=0, vmax=0.5, origin="lower")
            axis.set_xticks(range(len(found)), list(found), rotation=60, fontsize=7)
            layers = list(next(iter(found.values())))
            axis.set_yticks(range(len(layers)), layers, fontsize=7)
            axis.set(title=name, xlabel="step")
        figure.colorbar(image, ax=panels, label="cosine distance")
        save(figure, folder / f"{scale}-distance.svg")
        made["distance"] = f"![Cosine distance by layer and step](results/{scale}-distance.svg)\n"
    return made


SECTIONS: tuple[tuple[str, str, Callable[[Json], Iterator[str]]], ...] = (
    (
        "Is pretraining worth it?",
        """Fine-tuning of atto from the pretrained encoder and from scratch, with the same labels, augmentation,
learning rate, batch and number of steps; layer decay differs (.9 and 1), and the size of the head's first
weights (a thousandth, and 1). Each seed draws other
labels (at 100 % all are used) and another head. There is one pretraining, so the spread is that of
fine-tuning. The only evaluation is at the end.""",
        budgets,
    ),
    (
        "Frozen features",
        """`fcmae evaluate` on the encoder as pretraining left it, on the same network with random weights, and on
pixels. One run each. The linear classifier's settings are chosen on a part of the training images.""",
        frozen,
    ),
    (
        "GRN",
        """tiny20, fine-tuned with 10 % of the labels. Published for base, 800 epochs on ImageNet-1k and fine-tuned
there (paper, Tables 2 and 3, top-1): V2 84.6; GRN dropped at fine-tuning 78.8, new at fine-tuning 80.6;
V1 83.7.""",
        grn,
    ),
    (
        "What one thing of pretraining changes",
        """tiny20, frozen features, stage 4; one run each, of fewer epochs than the runs above. Losses at different
mask ratios are of different tasks and not comparable. *Not masked inside*: the encoder is a dense
network on the image without its hidden pixels, the paper's Table 1 (79.3 against 83.7 with a sparse
encoder, for base).""",
        varied,
    ),
    (
        "Feature collapse",
        """Cosine distance of the channels of the expanded features (paper, Sec. 4; `fcmae analyze`), averaged over
the blocks of a stage, at the first and the last checkpoint: .5 is unrelated channels, 0 all alike.""",
        distances,
    ),
    (
        "Which loss is normal",
        """Targets are standardised by patch, so a model that predicts each patch's mean has a loss of 1. Of the runs
named `curve`, which are shipped configurations, that of `pretrain_demo` is whole, and on a CPU that of `pretrain_cpu`
is stopped after four minutes, of 100 epochs, at the learning rates of the whole run.""",
        losses,
    ),
)

HEAD = """# Results

What pretraining gives on three small sets of images, what its parts give, and which losses are normal.
Written by `studies/results.py` from the JSON of each study. `python studies/run_all.py` runs all of them, two commands
at a time, on 2 cores in 63 hours by estimate; what was made on a GPU, of small images and CONTAINER, is smaller there.
The numbers of `make demo` are those of the demo, and the words between the tables are ours. Learning rates are
`optim.base_lr`, of 256 images, unless a batch is named. Scores are in %; ± is the half width of the 95 % interval of
the mean over seeds (Student's t). *Better* and *worse* are said of three runs or more, where the interval of the
differences excludes 0.

- **tiny20**: 20 classes of Tiny ImageNet (every tenth, sorted by name), 10,000 photographs to learn from, 1,000 to test
  on, 64 pixels; not part of this project: `studies/sets.py` says how they are packed.
- **CIFAR-10**: 50,000 photographs to learn from, 10,000 to test on, 32 pixels, of ten kinds.
- **solar**: 2,624 photographs of solar cells (the package elpv-dataset), 1,968 to learn from, 656 in whole
  blocks of its list to test on, so of other modules but at the blocks' edges, 128 pixels, grey; defective or not.

No number here is of the paper's scale: it pretrains for 800 epochs on 1.28 million photographs.
"""

# By studies/segmentation.py, where it was run.
MAPPED = {"land_and_sea": "sea, land and lakes", "brain": "grey and white matter"}


def page(found: Mapping[str, Json], folder: Path) -> str:
    """docs/results.md. found: the JSON by scale. folder: where figures go, and where SCALE.md and others may lie."""
    links = [f"[{what}]({name}.md)" for name, what in MAPPED.items() if (folder.parent / f"{name}.md").exists()]
    parts = [HEAD, *([f"Of label maps: {', '.join(links)}.\n"] if links else [])]
    if small := small_images.headline(folder.parent):
        parts.append(f"## Small images, few labels\n\n{small}\n")
    if section := labels.section(folder.parent):
        parts.append(f"## By labels and views\n\n{section}\n")
    if (long := folder.parent / "demo-long" / paired.FILE).exists():
        compared = paired.compare(paired.COMPARISON.validate_json(long.read_text()))
        rows = table(paired.COLUMNS, map(paired.cells, compared), left=2)
        reading = folder / "cifar10.md"
        text = f"{reading.read_text()}\n" if reading.exists() else ""
        parts.append(f"## CIFAR-10, few labels\n\n{text}{rows}\n")
    parts += [path.read_text() for name in ("recipe", "collapse") if (path := folder / f"{name}.md").exists()]
    for scale, results in found.items():
        hours = sum(job["seconds"] for job in results["jobs"].values()) / 3600
        on = in_words(results["machine"])
        parts.append(f"## Scale: {scale}\n")
        parts.append(f"{on}; {hours:.1f} hours of commands.\n")
        reading = folder / f"{scale}.md"
        if reading.exists():
            parts.append(reading.read_text())
        figures = draw(results, folder)
        for title, text, tables in SECTIONS:
            shown = list(tables(results))
            if shown:
                parts += [f"### {title}\n", text + "\n", *(f"{each}\n" for each in shown)]
                parts += [
                    figures[key]
                    for key, at in (("loss", losses), ("distance", distances))
                    if at is tables and key in figures
                ]
        parts += ["### Commands\n", f"All of them: `python studies/run_all.py --tiny20 SHARDS --scale {scale}`."]
        parts.append("One by one (seed 0; the others differ in")
        parts.append(f"`--seed` and the CSV file):\n\n```bash\n{commands(results)}\n```\n")
    return "\n".join(parts)


def others(docs: Path) -> str:
    """The last sections of the pages of the other networks, as far as their studies have been run."""
    parts = []
    for name, title in (("roadmap", "From ResNet to ConvNeXt"), ("container", "CONTAINER"), ("pruning", "Pruning")):
        if (docs / f"{name}.json").exists():
            _, _, section = f"\n{(docs / f'{name}.md').read_text()}".rpartition("\n## ")
            heading, _, text = section.partition("\n")
            parts.append(f"### [{title}]({name}.md): {heading}\n{text}")
    return "\n".join(["\n## Other networks\n", *parts]) if parts else ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder docs")
    args = parser.parse_args(argv)
    folder: Path = args.docs / "results"
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    (args.docs / "results.md").write_text(page(found, folder) + others(args.docs))
    print(args.docs / "results.md")


if __name__ == "__main__":
    main()
