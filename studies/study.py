"""What the studies share: commands that are run once, each as soon as what it needs is done, and what they found."""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sets import Labelled, few, folder_rows, write_csv

from fcmae.atomic import write_text
from fcmae.evaluation.paired import METRIC, Row, compare
from fcmae.options.files import find_config, read_yaml
from fcmae.training.records import cpu_name, read_metrics

STUDIES = Path(__file__).parent
FCMAE = (sys.executable, "-m", "fcmae.cli")
# What needs no network, by the names of their probes: for `fcmae evaluate`, and for tables.
CONTROLS = {
    "pixels": ("pixels:32", "raw pixels, 32 x 32"),
    "mean": ("pixels:1", "mean colour"),
    "histogram": ("histogram:8", "colour histogram"),
}
K = 20  # neighbours
MACHINE = re.compile("gpu (.+), cores (.+), cpu (.+), torch (.+)")  # see `in_words`
TOLD_TO_STOP = (signal.SIGTERM, signal.SIGHUP)
PATTERN = re.compile(r"[\w./*?=-]+")  # of paths, which a shell expands


@dataclass(frozen=True)
class Job:
    """A command that writes below runs/NAME.

    words: the command; patterns of paths are expanded when it starts. needs: names of the jobs whose results it reads.
    minutes: how long it may run; it is then told to stop, which saves what it has.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    minutes: float | None = None


# The command line


def add_arguments(
    parser: argparse.ArgumentParser, out: str, at_once: int | None = None, *, has_page: bool = False
) -> None:
    """What every study takes.

    at_once: commands at a time, where they have a thread each. has_page: whether it has a part of a page of docs/.
    """
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where to write [{out}]")
    if at_once is not None:
        words = "commands at a time, each of one thread if more than one"
        parser.add_argument("--at-once", type=int, default=at_once, help=f"{words} [{at_once}]")
    if has_page:
        parser.add_argument("--docs", type=Path, metavar="DIR", help="also write its JSON and its part of a page there")
    parser.add_argument("--only", nargs="*", default=[""], metavar="PREFIX", help="jobs whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")


def chosen(
    args: argparse.Namespace, every: Iterable[Job], page: str = "", *, tells_machines: bool = False
) -> list[Job]:
    """The jobs that --only names. With --list their commands are printed, and the program ends.

    page: the JSON below --docs that will have what they find. tells_machines: its tables are told by machine.

    Raises:
        SystemExit: if a job was done with other words, or another --config of the same name, named here or not: a
            table would have both; if one was done on another machine than those that are to be run; or if the page has
            other runs, which `write_found` would refuse after all hours.
    """
    every, out = list(every), args.out.absolute()
    wanted = [job for job in every if job.name.startswith(tuple(args.only))]
    for job in every:
        if is_done(job, out):
            record = record_of(job, out)
            if _lasting(record["command"]) != _lasting(shown(job, out)):
                sys.exit(
                    f"{out}: {job.name} was done by other settings ({record['command']}): give the same ones, or "
                    "another --out"
                )
            if record.get("config", digest := config_digest(job)) != digest:  # older records have none
                sys.exit(f"{out}: {job.name} was done by another version of its --config: give another --out")
    here = in_words(this_machine())
    machines = {record_of(job, out).get("machine", here): job.name for job in every if is_done(job, out)}  # old: none
    machines |= {} if all(is_done(job, out) for job in wanted) else {here: "what is to be run"}
    if len(machines) > 1 and not tells_machines:
        told = "; ".join(f"{name}: {machine}" for machine, name in machines.items())
        sys.exit(f"{out} would have runs of several machines ({told}): go on where it began, or give another --out")
    if page and args.docs:
        names = {job.name for job in wanted}
        refuse_others(
            args.docs / page, {job.name: shown(job, out) for job in every if job.name in names or is_done(job, out)}
        )
    if args.list:
        for job in wanted:
            print(f"# {job.name}\n{shown(job, out)}")
        raise SystemExit(0)
    return wanted


def probe(name: str, model: str, data: Path, out: Path, needs: tuple[str, ...], *words: str) -> Job:
    """`fcmae evaluate` on all training labels of a folder, tested on its test images."""
    given = ("evaluate", model, "--data", f"{data}/train-100-0.csv", "--test", f"{data}/test.csv")
    more = ("--num-workers", "1", "--overwrite", "--out", f"{out}/runs/{name}")
    return Job(name, (*FCMAE, *given, *words, *more), needs)


# Running


def prepare_tiny20(shards: Path, out: Path, draws: Mapping[int, int], trials: int = 1) -> None:
    """The images, and which labels are used, train-PERCENT-SEED.csv.

    Trials, which choose settings, are on tune-PERCENT-SEED.csv and tested on tune-test-PERCENT-SEED.csv: draws of their
    own, of training images alone.

    draws: their number, by per cent of the labels. trials: likewise, of each.
    """
    write_images("tiny20", out, str(shards))
    rows = folder_rows(out / "tiny20" / "train")
    write_csv(out / "test.csv", folder_rows(out / "tiny20" / "val"))
    for percent, seeds in draws.items():
        for seed in range(seeds):
            write_csv(out / f"train-{percent}-{seed}.csv", few(rows, percent / 100, seed))
        for seed in range(trials):
            labelled, held_out = trial(rows, percent / 100, seed)
            write_csv(out / f"tune-{percent}-{seed}.csv", labelled)
            write_csv(out / f"tune-test-{percent}-{seed}.csv", held_out)


def trial(rows: list[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """A share of the rows, nine tenths at the most, and 9 % of all that are not among them, of each class alike."""
    labelled = few(rows, min(share, 0.9), 100 + 2 * seed)
    taken = set(labelled)
    rest = [row for row in rows if row not in taken]
    return labelled, few(rest, 0.09 * len(rows) / len(rest), 101 + 2 * seed)


def write_images(name: str, out: Path, *source: str, seeds: int = 3) -> None:
    """OUT/NAME, by studies/sets.py."""
    words = (str(STUDIES / "sets.py"), name, *source, str(out / name), "--seeds", str(seeds))
    subprocess.run([sys.executable, *words], check=True)


def schedule(wanted: Iterable[Job], out: Path, at_once: int, threads: int | None) -> list[str]:
    """Run the jobs in their order, each as soon as what it needs is done; the names of those that were not done.

    Stopped by SIGTERM, SIGHUP or an interrupt, it stops what runs, which saves what it has, and waits for it.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    done = {path.stem for path in (out / "jobs").glob("*.json") if not path.name.startswith(".")}
    waiting, running = [job for job in wanted if job.name not in done], dict[Future[bool], Job]()
    total, begun, processes = len(waiting), time.time(), list[subprocess.Popen[bytes]]()
    failed = list[str]()
    before = {
        number: signal.signal(number, lambda number, frame: sys.exit(128 + number))
        for number in TOLD_TO_STOP
        if signal.getsignal(number) != signal.SIG_IGN  # as `nohup` has it
    }
    try:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                while waiting or running:
                    ready = [job for job in waiting if done.issuperset(job.needs)][: at_once - len(running)]
                    for job in ready:
                        waiting.remove(job)
                        processes.append(start(job, out, threads))
                        running[pool.submit(finish, processes[-1], job, out, threads)] = job
                    if not running:
                        left = [job.name for job in waiting]
                        print(f"not run, as what they need failed: {', '.join(left)}", file=sys.stderr)
                        return failed + left
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        job = running.pop(future)
                        if future.result():
                            done.add(job.name)
                        else:
                            failed.append(job.name)
                        minutes, number = (time.time() - begun) / 60, total - len(waiting) - len(running)
                        print(f"{minutes:6.1f} min, {number} of {total}: {job.name}", flush=True)
            finally:
                for process in processes:
                    process.terminate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def end(failed: Sequence[str], refused: Sequence[str] = ()) -> None:
    """End the program, after what is there was written, with what was refused and the names of jobs that failed.

    Raises:
        SystemExit: if there are any.
    """
    if failed:
        refused = [
            *refused,
            f"not done: {', '.join(failed)}; their logs say why, and the same command tries them again",
        ]
    if refused:
        sys.exit("\n".join(refused))


def start(job: Job, out: Path, threads: int | None) -> subprocess.Popen[bytes]:
    """Start one job, whose output goes to OUT/jobs."""
    for left in (out / "runs" / job.name).glob(".features-*"):  # of `fcmae evaluate`, when it was killed
        shutil.rmtree(left)
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with (out / "jobs" / f"{job.name}.log").open("ab") as file:
        return subprocess.Popen(expanded(job.words), stdout=file, stderr=file, env=environment)


def finish(process: subprocess.Popen[bytes], job: Job, out: Path, threads: int | None) -> bool:
    """Wait for a job, and write a record of it to OUT/jobs if it succeeded, which is returned.

    What was stopped goes on from there at its next start: its seconds are kept beside, and count.
    """
    before = out / "jobs" / f"{job.name}.seconds"
    started = time.time() - (float(before.read_text()) if before.exists() else 0)
    # Each start has a while at least, in which it can be told to stop.
    ends = math.inf if job.minutes is None else max(started + 60 * job.minutes, time.time() + min(60, 60 * job.minutes))
    while True:
        try:
            status = process.wait(max(0.0, min(60.0, ends - time.time())))
            break
        except subprocess.TimeoutExpired:
            write_text(before, f"{time.time() - started:.1f}")  # this process may be killed
            if time.time() >= ends:
                process.terminate()
                status = process.wait()
                status = 0 if status == 128 + signal.SIGTERM else status  # fcmae's own, when it was told to stop
                break
    if status:
        print(f"{job.name}: status {status}, see {out / 'jobs' / job.name}.log", file=sys.stderr, flush=True)
        write_text(before, f"{time.time() - started:.1f}")
        return False
    before.unlink(missing_ok=True)
    record = {
        "name": job.name,
        "command": shown(job, out),
        "seconds": round(time.time() - started, 1),
        "machine": in_words(this_machine()),
        "threads": threads,
        "config": config_digest(job),
    }
    write_text(out / "jobs" / f"{job.name}.json", json.dumps(record, indent=1))
    return True


def config_digest(job: Job) -> str | None:
    """What the settings of the job's --config, if it has one, hash to; its comments do not count."""
    named = [word.removeprefix("--config=") for word in job.words if word.startswith("--config=")]
    settings = [read_yaml(find_config(name)) for name in named]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16] if settings else None


def expanded(words: Sequence[str]) -> list[str]:
    """As a shell would: a pattern becomes the paths that match it, in order, or stays as it is."""
    return [path for word in words for path in sorted(glob.glob(word)) or [word]]  # noqa: PTH207


def shown(job: Job, out: Path) -> str:
    """The command as one would type it."""
    words = ["python" if word == sys.executable else word for word in job.words]
    quoted = [word if PATTERN.fullmatch(word) else shlex.quote(word) for word in words]
    text = " ".join(quoted).replace("python -m fcmae.cli", "fcmae").replace(f"{STUDIES.parent}/", "")
    return text.replace(f"{out}/", "runs/studies/")


# What was found


def is_done(job: Job, out: Path) -> bool:
    return (out / "jobs" / f"{job.name}.json").exists()


def record_of(job: Job, out: Path) -> dict[str, Any]:
    """What `finish` wrote of a job that is done."""
    record: dict[str, Any] = json.loads((out / "jobs" / f"{job.name}.json").read_text())
    return record


def last_scores(out: Path, every: Iterable[Job], key: str) -> dict[str, dict[str, Any]]:
    """The last scores of each run that is done and has them, by name; key: one of them."""
    found = {}
    for job in every:
        if is_done(job, out):
            for line in read_metrics(out / "runs" / job.name / "metrics.jsonl"):
                if key in line:
                    found[job.name] = {name: value for name, value in line.items() if name not in ("step", "epoch")}
    return found


def scores_by_seed(out: Path, every: Iterable[Job], arms: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """Top-1 of the runs named ARM-SEED that are done."""
    found = last_scores(out, every, "top1")
    return [
        {"arm": name, "seed": seed, "top1": found[run]["top1"]}
        for name in arms
        for seed in range(seeds)
        if (run := f"{name}-{seed}") in found
    ]


def facts(out: Path, every: Iterable[Job]) -> dict[str, Any]:
    """Where they ran, and of the jobs that are done the commands and seconds."""
    done = {job.name: record_of(job, out) for job in every if is_done(job, out)}
    found = MACHINE.fullmatch(next((record["machine"] for record in done.values() if "machine" in record), ""))
    told = this_machine() if found is None else dict(zip(this_machine(), found.groups(), strict=True))
    return {
        "machine": told | {"cores": int(told["cores"])},
        "commands": {name: record["command"] for name, record in done.items()},
        "seconds": {name: record["seconds"] for name, record in done.items()},
    }


def this_machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "cores": os.cpu_count(), "cpu": cpu_name(), "torch": torch.__version__}


def in_words(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def write_found(path: Path, found: Mapping[str, Any], runs: str = "commands") -> None:
    """Write what was found as JSON, unless `refuse_others` refuses; runs: which part of it names them."""
    refuse_others(path, found[runs], runs)
    write_text(path, json.dumps(found, indent=1) + "\n")


def refuse_others(path: Path, commands: Mapping[str, Any], runs: str = "commands") -> None:
    """That what others have found is not replaced.

    Args:
        path: of JSON, or of no file yet.
        commands: of the runs that it is to have, by name.
        runs: which part of the JSON names them.

    Raises:
        SystemExit: if the file has runs that are not among these, or made by other commands.
    """
    there = json.loads(path.read_text())[runs] if path.is_file() else {}
    if lost := sorted(there.keys() - commands.keys()):
        sys.exit(
            f"{path} has {len(lost)} runs that are not among these, {lost[0]} one of them: give the folder that they "
            "are in, or another --docs"
        )
    if other := sorted(name for name, run in there.items() if _command(run) != _command(commands[name])):
        sys.exit(
            f"{path} has {len(other)} runs that were made by other commands, {other[0]} one of them: give the study "
            "the same settings, or another --docs"
        )


def _command(run: str | Mapping[str, Any]) -> str:
    return _lasting(run if isinstance(run, str) else str(run["command"]))


def _lasting(command: str) -> str:
    """The command without what changes no result."""
    return command.replace(" --overwrite", "")


def write_section(docs: Path, name: str, heading: str, section: Callable[[dict[str, Any]], str]) -> None:
    """Write the end of docs/NAME.md, from the heading on: our words in docs/results/NAME.md, and the section.

    section: of what docs/NAME.json holds.
    """
    found, words = json.loads((docs / f"{name}.json").read_text()), docs / "results" / f"{name}.md"
    parts = [heading, *([words.read_text().strip()] if words.is_file() else []), section(found).strip()]
    page = docs / f"{name}.md"
    head, there, _ = page.read_text().partition(heading) if page.is_file() else ("", heading, "")
    if not there:
        raise ValueError(f"{page} has no line {heading!r}: put it where the section belongs")
    write_text(page, head + "\n\n".join(parts) + "\n")


def paired(scores: Iterable[tuple[str, str, int, float]], against: Mapping[str, str | None]) -> list[Row]:
    """The rows of `fcmae worth`'s table, of other scores: arms that are compared seed by seed.

    scores: arm, labels, seed and value. against: what each arm is compared with, in the order of the rows.
    """
    found = [{"arm": arm, "labels": labels, "seed": seed, "scores": {METRIC: v}} for arm, labels, seed, v in scores]
    comparison: Any = {
        "amounts": [{"labels": labels} for labels in dict.fromkeys(score["labels"] for score in found)],
        "arms": [{"name": arm, "against": other} for arm, other in against.items()],
        "scores": found,
    }
    return compare(comparison)


def of_probe(found: Sequence[Mapping[str, Any]], probe: str, metric: str, stage: int | None) -> float | None:
    """A score of kNN at K neighbours, or of the linear probe; stage None where there is none, as of pixels."""
    for result in found:
        if result["probe"] == probe and result.get("stage") == stage and result["setting"].get("k", K) == K:
            value: float | None = result["scores"].get(metric)
            return value
    return None


def half_width(result: Mapping[str, Any], metric: str) -> str:
    """Mean and 95 % interval of a score over draws of labels."""
    mean, (low, high) = result["scores"][metric], result["spread"][metric]
    return f"{100 * mean:.1f} ± {100 * (high - low) / 2:.1f}"


def percent_of(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def save(figure: Any, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fcmae", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
