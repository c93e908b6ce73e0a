"""docs/reliability.md from docs/reliability.json, which `python -m chaos --docs docs` writes.

    PYTHONPATH=tests python -m chaos.page docs

What we promise is written here; how often it was tried, and how often it failed, is in the JSON file.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fcmae
from fcmae.atomic import write_text
from fcmae.tables import table

HEAD = """# Reliability

What we promise of a user's files and results, how it is tested, how often that was tried, and how often it failed.
Written by `tests/chaos` from `docs/reliability.json`. A minute of it, or an hour:

```bash
make chaos MINUTES=60 SEED=1
```

draws trials at random from the seed, prints each that fails with the folder of its files, and ends with status 1 if
one did. `PYTHONPATH=tests .venv/bin/python -m chaos --only PART:SEED:NUMBER` does one again. Runs are of the smallest
network on images of 16 pixels, in real processes. No failure in n trials leaves room for one in some n / 3: read the
counts before the promises. Each test of the package's own stands for one fault that was found;
these look for the next.
"""
PARTS = {
    "kills": (
        "Runs that are killed",
        """A run that is stopped or killed at any moment goes on when its command is given again, and ends with the
weights, moments, averages, predictions and numbers of a run that nothing disturbed, to the last bit. No process and no
temporary file stays. SIGTERM, SIGINT and SIGHUP save first. The ways are SIGKILL, SIGTERM, SIGINT once and twice,
SIGHUP, and SIGKILL to a worker; what the table lacks was not drawn. Where the parts of a batch are chosen (`grad_accum:
auto`), a run that is cut off before its first line takes smaller ones, as if for want of memory, and then rounds
otherwise; the trials give their number.

Each trial kills one run up to five times, at random moments or just before random file operations, saving included,
and compares everything at the end.""",
    ),
    "corruptions": (
        "Files that are damaged",
        """Whatever happens to a file of a run or an export, a command that reads it gives the result of the undamaged
file, or one sentence that names the file, with status 2. A report is written all the same. Nothing crashes, hangs, or
goes on with other numbers.

Each trial damages one file (bits flipped, cut, emptied, other contents, another type of a value, removed, a folder or a
link in its place) and runs one command: the run's own again, `report`, `convert`, `predict`, `evaluate`, `embed` or
`analyze`. Both are drawn, so that not every command reads the file.""",
    ),
    "overwrites": (
        "Files of the user's",
        """No command deletes or changes a file whose name is none of its own, with or without `--overwrite`; without
it, no result is replaced either. With it a run deletes, in its directory, what is named as runs name their files, and
what evaluate and analyze write there.

Each trial puts files that are named like ours, or lie inside our folders, or behind links, where a command writes, and
compares their bytes afterwards.""",
    ),
    "hostile": (
        "Files that are made to do harm",
        """Nothing that is read runs code, takes memory out of proportion, hangs, or writes to the terminal what it was
not meant to. Images that cannot be read are named and skipped.

Each trial makes images, weights (pickles that call functions, headers that lie, tensors of other kinds), settings (YAML
that grows or calls), histories or names, and gives them to a command that reads such.""",
    ),
    "full_disk": (
        "Disks that are full",
        """A run that finds no space says so in a sentence, leaves its last checkpoint whole and no half-written file,
and goes on to the same results once there is space.

Each trial leaves a run less space than it needs, on a small disk where that can be mounted, else by a limit on the size
of files.""",
    ),
}
Json = dict[str, Any]


def write(docs: Path, counts: Json, seed: int, minutes: float) -> Path:
    """Put the counts into reliability.json, in place of those of the parts that were tried, and write the page."""
    path = docs / "reliability.json"
    found: Json = json.loads(path.read_text()) if path.exists() else {}
    of = {"fcmae": fcmae.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for part, kinds in counts.items():
        found[part] = {"kinds": dict(sorted(kinds.items())), "seed": seed, "minutes": round(minutes, 1), "of": of}
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(docs / "reliability.md", page(found))
    return docs / "reliability.md"


def page(found: Json) -> str:
    """The page, a function of the counts alone."""
    texts = [HEAD]
    for part, (title, promise) in PARTS.items():
        texts.append(f"## {title}\n\n{promise}\n")
        if part not in found:
            texts.append("Not tried.\n")
            continue
        kinds = found[part]["kinds"]
        rows = [[kind, str(number["tried"]), str(number["failed"])] for kind, number in kinds.items()]
        rows.append(["all", *(str(sum(n[what] for n in kinds.values())) for what in ("tried", "failed"))])
        texts.append(table(["", "tried", "failed"], rows) + "\n")
        versions = ", ".join(f"{name} {version}" for name, version in found[part]["of"].items())
        texts.append(f"Seed {found[part]['seed']}, of a pass of {found[part]['minutes']:g} minutes; {versions}.\n")
    return "\n".join(texts)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder, {}, 0, 0)
