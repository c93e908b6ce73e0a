"""Collect the numbers of the studies: from what studies/run_all.py wrote to the JSON that docs/results.md is made of.

python studies/collect.py runs/studies --scale cpu      # writes docs/results/cpu.json
python studies/results.py                               # writes docs/results.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from study import write_found

from fcmae.training.records import read_metrics

DOCS = Path(__file__).parents[1] / "docs"
Json = dict[str, Any]
POINTS = 200  # of a loss curve, at most


def collect(runs: Path, scale: str) -> Json:
    """Everything that the page shows, from the folder that studies/run_all.py wrote."""
    jobs = {path.stem: json.loads(path.read_text()) for path in sorted((runs / "jobs").glob("[!.]*.json"))}
    found: Json = {
        "scale": scale,
        "machine": machine(runs),
        "jobs": jobs,
        "scores": {},
        "probes": {},
        "curves": {},
        "time": {},
    }
    for name in jobs:
        run = runs / "runs" / name
        kind = name.partition("-")[0]
        if kind in ("tune", "grn"):
            found["scores"][name] = final_scores(run)
        elif kind in ("main", "short", "curve"):
            found["curves"][name] = curve(run)
        elif kind in ("probe", "few"):
            found["probes"][name.removeprefix("probe-")] = evaluation(run / "evaluation.json")
        elif kind == "time":
            found["time"][name.removeprefix("time-")] = over_time(run / "analysis.json")
    return found


def machine(runs: Path) -> Json:
    """What the newest run was trained with, as it says itself."""
    files = sorted((runs / "runs").glob("*/environment.json"), key=lambda path: path.stat().st_mtime)
    start = json.loads(files[-1].read_text())[-1]
    gpu = start["device_name"] if start["device"] != "cpu" else "none"
    return {"CPU": start["cpu"], "cores": start["cores"], "GPU": gpu, **start["versions"]}


def final_scores(run: Path) -> Json:
    """The only evaluation, at the end: no score has chosen a model. steps: of the optimizer."""
    line = [line for line in read_metrics(run / "metrics.jsonl") if "top1" in line][-1]
    kept = {name: line[name] for name in ("top1", "balanced_accuracy", "auroc", "val_loss") if name in line}
    return kept | {"steps": line["step"]}


def curve(run: Path) -> Json:
    """Training loss against epochs, thinned to the mean of neighbouring lines, and every validation loss."""
    lines = read_metrics(run / "metrics.jsonl")
    train = np.array([(line["epoch"], line["loss"]) for line in lines if "loss" in line])
    parts = [part.mean(0) for part in np.array_split(train, max(1, min(POINTS, len(train))))]
    return {
        "loss": [[round(float(epoch), 3), round(float(loss), 4)] for epoch, loss in parts],
        "val_loss": [[line["epoch"], round(line["val_loss"], 4)] for line in lines if "val_loss" in line],
        "steps": lines[-1]["step"],
    }


def evaluation(path: Path) -> list[Json]:
    results: list[Json] = json.loads(path.read_text())["results"]
    return [{key: r[key] for key in ("probe", "stage", "setting", "scores", "spread") if key in r} for r in results]


def over_time(path: Path) -> Json:
    """Cosine distance of each layer at each checkpoint of a run, by step."""
    models = json.loads(path.read_text())["models"]
    return {
        str(model["origin"]["step"]): {layer["name"]: layer["cosine_distance"] for layer in model["layers"]}
        for model in models
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that studies/run_all.py wrote")
    parser.add_argument("--scale", default="cpu", help="the scale that it ran at [cpu]")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder docs")
    args = parser.parse_args(argv)
    place: Path = args.docs / "results" / f"{args.scale}.json"
    found = collect(args.runs, args.scale)
    write_found(place, found, "jobs")
    print(f"{place}: {len(found['jobs'])} jobs")


if __name__ == "__main__":
    main()
