"""A file of a run or an export is damaged: what reads it gives the right result or one sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from chaos.commands import command, different, digest, fault, results
from chaos.samples import FORMATS, WRONG, Samples

Damage = Callable[[Path, random.Random, Path], None]  # of a file; its run


def flip(path: Path, rng: random.Random, run: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        # Half of them at the beginning, where headers are.
        position = rng.randrange(min(len(content), 400) if rng.random() < 0.5 else len(content))
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random, run: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def empty(path: Path, rng: random.Random, run: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path, rng: random.Random, run: Path) -> None:
    path.write_bytes(rng.randbytes(rng.randint(1, 2000)))


def insert(path: Path, rng: random.Random, run: Path) -> None:
    content = path.read_bytes()
    position = rng.randrange(len(content))
    path.write_bytes(content[:position] + rng.choice((b"\0", b"\xff\xfe", b"\n\n", b"[" * 5000)) + content[position:])


def swap(path: Path, rng: random.Random, run: Path) -> None:
    shutil.copyfile(rng.choice([other for other in files(run) if other != path]), path)


def retype(path: Path, rng: random.Random, run: Path) -> None:
    """Give one value of a JSON file, or a line of one, another type."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    tree = json.loads(lines[number])
    places = list(walk(tree))
    holder, key = rng.choice(places)
    holder[key] = rng.choice(WRONG)
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n")


def walk(tree: Any) -> list[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *walk(value))]


def remove(path: Path, rng: random.Random, run: Path) -> None:
    path.unlink()


def folder(path: Path, rng: random.Random, run: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: random.Random, run: Path) -> None:
    path.unlink()
    path.symlink_to(rng.choice(("nowhere", path.name)))


DAMAGES: tuple[Damage, ...] = (
    flip,
    flip,
    flip,
    cut,
    empty,
    garbage,
    insert,
    swap,
    retype,
    retype,
    remove,
    folder,
    link,
)


def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
    """Damage one file, and run one command that may read it."""
    name = rng.choice(("cut", "finished", "exports"))
    kind = rng.choice((*FORMATS, "classifier") if name == "exports" else ("pretrain", "finetune"))
    place = samples.copy(getattr(samples, name)[kind], folder)
    found = [path for path in files(place) if path.stat().st_size]
    path = rng.choice(found)
    damage = rng.choice(DAMAGES)
    if damage is retype and path.suffix not in (".json", ".jsonl"):
        damage = flip
    if damage is swap and len(found) < 2:
        damage = garbage
    damage(path, rng, place)
    whats = OF_ENCODERS if name == "exports" else ("resume", "resume", "report", *OF_ENCODERS)
    what = rng.choice((*whats, "predict") if kind in ("finetune", "classifier") else whats)
    outcome = command(words_of(what, samples, kind, place, folder), folder)
    wrong = fault(outcome)
    if wrong is None and outcome.status == 2 and what == "report" and path.name != "config.yaml":
        wrong = f"a report that fails: {outcome.error}"
    if wrong is None and outcome.status == 0:
        wrong = _different(samples, name, kind, what, path, place)
    said = f"{damage.__name__} {path.relative_to(folder)}, then {what}: {wrong}"
    return damage.__name__, said if wrong else None


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]


def words_of(what: str, samples: Samples, kind: str, place: Path, folder: Path) -> list[str]:
    """The command line that reads `place` and writes to `folder`; "resume" is the run's own."""
    if what == "resume":
        return samples.words(kind, place)
    text = COMMANDS[what].format(place=place, folder=folder, images=samples.images, labelled=samples.labelled)
    return text.split()


COMMANDS = {
    "report": "report {place} --out {folder}/report.html",
    "convert": "convert {place} {folder}/converted.safetensors --to fcmae",
    "predict": "predict {place} {images} --csv {folder}/p.csv --num_workers 0",
    "evaluate": "evaluate {place} --data {labelled} --probes knn --num_workers 0 --out {folder}/evaluated",
    "embed": "embed {place} --images {images} --map none --num_workers 0 --out {folder}/embedded",
    "analyze": "analyze {place} --images {images} --num_workers 0 --out {folder}/analyzed",
}
OF_ENCODERS = ("convert", "evaluate", "embed", "analyze")
_expected: dict[tuple[str, str, str], str] = {}


def _different(samples: Samples, name: str, kind: str, what: str, damaged: Path, place: Path) -> str | None:
    """How the results of a command that succeeded differ from those on undamaged files."""
    if what == "report":
        return None if (place.parent / "report.html").is_file() else "no page"
    if what == "resume":
        return different(results(place, without=damaged), results(samples.finished[kind], without=damaged))
    if (name, kind, what) not in _expected:
        aside = samples.root / "expected" / f"{name}-{kind}-{what}"
        aside.mkdir(parents=True)
        source = samples.copy(getattr(samples, name)[kind], aside)
        command(words_of(what, samples, kind, source, aside), aside)
        _expected[name, kind, what] = _content(aside)
    return None if _content(place.parent) == _expected[name, kind, what] else "silently different numbers"


def _content(folder: Path) -> str:
    """What a command has found, whichever it was."""
    if (path := folder / "converted.safetensors").exists():
        return str({name: digest(value) for name, value in load_file(path).items()})
    if (path := folder / "p.csv").exists():
        return path.read_text()
    if (path := folder / "embedded" / "features.npy").exists():
        return str(np.load(path).tolist())
    if (path := folder / "evaluated" / "evaluation.json").exists():
        return str(json.loads(path.read_text())["results"])
    if (path := folder / "analyzed" / "analysis.json").exists():
        return str(json.loads(path.read_text())["models"][0]["layers"])
    return "nothing"
