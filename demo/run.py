"""The whole path on real images: pretrain without labels, convert, fine-tune with few labels, compare with scratch, and
put all of it on one page.

    make demo                                # or: .venv/bin/python demo/run.py --out runs/demo

The images are the ELPV dataset: 2,624 electroluminescence photographs of solar cells, 300 x 300 grey, each with the
probability that the cell is defective (Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021; images CC-BY-NC-SA 4.0,
installed from the package `elpv-dataset`). Neighbours in its list are cut from one solar module, so training and test
cells are whole blocks of the list: a random split would show the network the test modules. Pretraining gains nothing
there; a table of photographs where it does stands beside theirs at the end, and `make demo-long` makes it anew.

Run it again to resume where it stopped. Delete the directory to start anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import elpv_dataset
import numpy as np

from fcmae.data.split import draw, share_of_each
from fcmae.evaluation import paired
from fcmae.tables import table

NUM_BLOCKS = 24  # about 109 cells each; one module has 60 or 72
TEST_BLOCKS = 6
METRICS = ("auroc", "balanced_accuracy")
MINUTES_LONG = 45  # of make demo-long
ROOT = Path(__file__).parents[1]


def read_dataset() -> tuple[list[Path], list[str]]:
    """Paths and labels in the order of the published list; a cell is defective from a probability of 2/3 on."""
    root = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    return [root / row[0] for row in rows], ["defective" if float(row[1]) > 0.5 else "functional" for row in rows]


def split_blocks(num_images: int) -> tuple[list[int], list[int]]:
    """Positions of the training and of the test cells: whole blocks of the list, the same for every seed."""
    blocks = np.array_split(np.arange(num_images), NUM_BLOCKS)
    order = np.random.default_rng(0).permutation(NUM_BLOCKS)
    test = sorted(order[:TEST_BLOCKS])
    training = sorted(order[TEST_BLOCKS:])
    return np.concatenate([blocks[i] for i in training]).tolist(), np.concatenate([blocks[i] for i in test]).tolist()


def few_labels(positions: Sequence[int], labels: Sequence[str], number: int, seed: int) -> list[int]:
    """A random `number` of the positions, the classes in proportion."""
    _, classes, counts = np.unique([labels[i] for i in positions], return_inverse=True, return_counts=True)
    return [positions[i] for i in draw(classes, share_of_each(counts, number / len(positions)), seed)]


def write_csv(path: Path, positions: Sequence[int], paths: Sequence[Path], labels: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([paths[i], labels[i]] for i in positions)


def fcmae(*words: object) -> None:
    """Run a command of the package, shown as one would type it.

    Raises:
        SystemExit: if it fails, or a signal asks to stop: it has then finished its step and saved.
    """
    command = [str(word) for word in words]
    print("\n$ fcmae " + " ".join(command), flush=True)
    process = subprocess.Popen([sys.executable, "-m", "fcmae.cli", *command])
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        # At a terminal the command has had the interrupt too: another one would end it before it saves.
        again = number == signal.SIGINT in received
        received.append(number)
        process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    status = process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if received:
        raise SystemExit(0 if received[0] == signal.SIGUSR1 else 128 + received[0])
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def last_scores(run: Path) -> dict[str, float]:
    """The scores of the last evaluation: none was used to choose a model."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = [line for line in lines if "top1" in line][-1]
    return found


def report(out: Path, seeds: int, labels: int, minutes: float) -> str:
    """A table of both starts: mean over the seeds and every single value."""
    lines = [f"{labels} labels, {seeds} seeds (labels drawn and head initialised anew), test on unseen blocks", ""]
    lines.append(f"| start | {' | '.join(METRICS)} |")
    lines.append("| --- |" + " --- |" * len(METRICS))
    for start in ("pretrained", "scratch"):
        runs = [last_scores(out / f"finetune-{start}-{seed}") for seed in range(seeds)]
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in runs]
            cells.append(f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        lines.append(f"| {start} | {' | '.join(cells)} |")
    pictures = sorted((out / "pretrain" / "reconstructions").glob("*.png"))
    lines += ["", f"reconstructions   {pictures[-1]}", f"loss curve        {out / 'pretrain' / 'loss.png'}"]
    lines += [f"encoder for timm  {out / 'encoder'}", f"classifier        {out / 'finetune-pretrained-0' / 'last'}"]
    lines.append(f"everything        {out / 'report.html'}")
    lines.append(f"\n{minutes:.1f} minutes since this command started")
    return "\n".join(lines)


def where_it_helps() -> str:
    """What pretraining gained on photographs: the table that `make demo-long` made, docs/cifar10.json."""
    found = paired.COMPARISON.validate_json((ROOT / "docs" / "cifar10.json").read_text())
    rows = table(paired.COLUMNS, map(paired.cells, paired.compare(found)), left=2)
    return f"""CIFAR-10, 50,000 photographs of ten kinds without labels and 500 with, measured before:

{rows}

`make demo-long` does that anew, in {MINUTES_LONG} minutes on 2 cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory for everything [runs/demo]")
    parser.add_argument("--seeds", type=int, default=2, help="fine-tunings of each kind [2]")
    parser.add_argument("--labels", type=int, default=100, help="labelled cells to fine-tune with [100]")
    args = parser.parse_args()
    started = time.perf_counter()
    out: Path = args.out
    if out.exists() and any(out.iterdir()) and not (out / "unlabeled.txt").is_file():
        parser.error(f"--out {out} holds something else: give a new directory")
    out.mkdir(parents=True, exist_ok=True)

    paths, labels = read_dataset()
    training, test = split_blocks(len(paths))
    (out / "unlabeled.txt").write_text("".join(f"{paths[i]}\n" for i in training))
    write_csv(out / "test.csv", test, paths, labels)
    write_csv(out / "labelled.csv", training, paths, labels)
    print(f"{len(training)} cells to learn from, {len(test)} to test on ({labels.count('defective')} defective in all)")

    fcmae("pretrain", "--config", "pretrain_demo", "--data.path", out / "unlabeled.txt", "--out", out / "pretrain")
    # Frozen features of the pretrained encoder and of an untrained one, tried with all the labels.
    compared = [out / "pretrain", f"random:{out / 'pretrain'}"]
    fcmae("evaluate", *compared, "--data", out / "labelled.csv", "--test", out / "test.csv", "--overwrite")
    shutil.rmtree(out / "encoder", ignore_errors=True)
    fcmae("convert", out / "pretrain", out / "encoder")
    for seed in range(args.seeds):
        few = out / f"few-{seed}.csv"
        write_csv(few, few_labels(training, labels, args.labels, seed), paths, labels)
        common = ["--data.path", few, "--data.val_path", out / "test.csv", "--seed", seed]
        for start, flags in (
            ("pretrained", ["--model.init", out / "encoder"]),
            # Layers that start from nothing have nothing that a lower learning rate would keep.
            ("scratch", ["--optim.layer_decay", 1]),
        ):
            run = out / f"finetune-{start}-{seed}"
            fcmae("finetune", "--config", "finetune_demo", *common, *flags, "--out", run)

    tuned = [out / f"finetune-{start}-{seed}" for start in ("pretrained", "scratch") for seed in range(args.seeds)]
    fcmae("report", out / "pretrain", *tuned, "--out", out / "report.html")
    text = report(out, args.seeds, args.labels, (time.perf_counter() - started) / 60)
    text = f"{text}\n\n{where_it_helps()}"
    (out / "report.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
