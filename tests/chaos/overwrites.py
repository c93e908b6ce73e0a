"""A user's files lie where commands write, named like ours, inside ours, behind links: their bytes stay."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from chaos.commands import command, fault
from chaos.samples import Samples

# Where a user's file may lie, from the directory that a command is told to write to.
STRANGE = [
    *("notes.txt", "mine/photo.psd", "checkpoints/keep-this/model.safetensors"),
    *("checkpoints/step-00000009/notes.txt", "checkpoints/step-00000009-good/model.safetensors"),
    *("checkpoints/step-final/checkpoint.json", "reconstructions/mine.psd"),
    *("reconstructions/tiles/mine/step-00000003.png", "best/notes.md", "best/old/model.safetensors"),
    *("tensorboard/other/events.out.tfevents.1", "evaluation/mine.json", "analysis/thesis/figure.png"),
    *("metrics.jsonl/mine", "config.yaml.bak", ".saved/mine"),
]
# Named as runs and commands name theirs.
OURS = [
    *("loss.png", "metrics.jsonl", "train.log", "best/model.safetensors", "last/config.json"),
    *("checkpoints/step-00000009/model.safetensors", "checkpoints/step-00000009/checkpoint.json"),
    *("predictions.csv", "reconstructions/step-00000003.png", "tensorboard/events.out.tfevents.1"),
    *("evaluation.json", "analysis.json", "features.npy", "config.json", "model.safetensors"),
]
Snapshot = dict[str, bytes]


def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
    """Plant a user's files and run a command that writes there."""
    scene = rng.choice(SCENES)
    return scene.__name__.replace("_", " "), scene(samples, rng, folder)


def files_without_a_run(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Nothing there is ours, whatever it is called, and whatever is asked."""
    out = folder / "out"
    kept = plant(out, rng, STRANGE + OURS)
    if rng.random() < 0.3:  # copied to begin the next experiment
        shutil.copy(samples.finished["pretrain"] / "config.yaml", out)
        return check(samples.words("pretrain", out), folder, out, kept)
    words = rng.choice((samples.words("pretrain", out), samples.words("finetune", out), *_into(samples, out)))
    can_overwrite = words[0] in ("pretrain", "finetune") and rng.random() < 0.5
    return check([*words, "--overwrite"] if can_overwrite else words, folder, out, kept)


def files_in_a_run(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """What is not named as ours stays, also with --overwrite; without it, all stays but for a run that goes on."""
    kind = rng.choice(("pretrain", "finetune"))
    out = samples.copy(samples.finished[kind], folder)
    if rng.random() < 0.3:
        shutil.rmtree(out / "checkpoints")  # tidied up
    everything = snapshot(out)
    kept = plant(out, rng, STRANGE)
    is_overwriting = rng.random() < 0.6
    seed = rng.choice(("0", "1"))  # its own command, or another's
    words = [*samples.words(rng.choice((kind, kind, "pretrain")), out), "--seed", seed]
    if is_overwriting:
        return check([*words, "--overwrite"], folder, out, kept)
    going_on = ("config.yaml", "environment.json", "train.log", ".lock", "files.json", "val_files.json")
    return check(words, folder, out, {n: c for n, c in (everything | kept).items() if n not in going_on})


def links_in_a_run(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Folders of a run that are links stay links, and what is not the run's behind them stays."""
    out = samples.copy(samples.finished["finetune"], folder)
    disk = folder / "disk"
    name = rng.choice(("checkpoints", "best", "tensorboard", "reconstructions"))
    disk.mkdir()
    if (out / name).exists():
        shutil.move(out / name, disk / name)
    else:
        (disk / name).mkdir()
    (out / name).symlink_to(disk / name)
    kept = plant(disk / name, rng, ["mine.txt", "other/mine.txt"]) if rng.random() < 0.7 else {}
    kept = {f"{name}/{path}": content for path, content in kept.items()}
    words = samples.words("finetune", out)
    wrong = check([*words, "--seed", "1", "--overwrite"], folder, folder / "disk", kept)
    return wrong or (None if (out / name).is_symlink() else f"{name} is no longer a link")


def dangling_links(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """A destination that is a link to nowhere is taken, as an existing one is."""
    out, elsewhere = folder / "out", folder / "elsewhere"
    words = rng.choice(_new_files(samples, out))
    place = Path(next(word for word in words if word.startswith(str(out))))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(elsewhere)
    wrong = check(words, folder, folder, {})
    if wrong is None and (elsewhere.exists() or not place.is_symlink()):
        return f"{words[0]} writes through, or over, a link that leads nowhere"
    return wrong


def existing_files(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """A destination that exists is refused."""
    out = folder / "out"
    words = rng.choice(_new_files(samples, out))
    place = Path(next(word for word in words if word.startswith(str(out))))
    place.parent.mkdir(parents=True, exist_ok=True)
    kept = plant(place, rng, ["mine.txt"]) if rng.random() < 0.3 else write(place)
    return check(words, folder, place if place.is_dir() else place.parent, kept)


def inputs_in_the_way(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """What a run reads is not deleted by it, and it does not write among it."""
    out = folder / "out"
    samples.copy(samples.finished["pretrain"], folder)
    (folder / "pretrain").rename(out)
    which = rng.choice(("init", "init, a file", "data", "labels", "data below", "init of evaluation"))
    words = samples.words("pretrain", out, seed=1)
    place = out
    if which == "init":
        words += ["--overwrite", "--init", str(out)]
    elif which == "init, a file":
        words += ["--overwrite", "--init", str(out / "checkpoints" / "step-00000009")]
    elif which == "data":
        shutil.copytree(samples.images, out / "images")
        words[words.index("--data.path") + 1] = str(out / "images")
        words.append("--overwrite")
    elif which == "labels":
        shutil.copytree(samples.labelled, out / "labelled")
        words += ["--monitor.labelled", str(out / "labelled"), "--overwrite"]
    elif which == "data below":
        place = Path(shutil.copytree(samples.images, folder / "photos"))
        words = samples.words("pretrain", place / rng.choice(("run", "deep/run")))
        words[words.index("--data.path") + 1] = str(place)
    else:
        words = ["evaluate", str(out), "--data", str(samples.labelled), "--out", str(out), "--overwrite"]
    before = snapshot(place)
    wrong = check(words, folder, place, before if which != "init of evaluation" else {})
    return wrong and f"{which}: {wrong}"


def homes(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """`~` is the home, wherever a path is written."""
    words = rng.choice([*_new_files(samples, Path("~/out")), samples.words("pretrain", Path("~/out"))])
    (folder / "out").mkdir()
    wrong = fault(command(words, folder), (0,))
    return wrong or (None if any((folder / "out").iterdir()) else f"{words[0]} does not write to the home")


OFTEN = (files_without_a_run, files_in_a_run)
SCENES = (*OFTEN, *OFTEN, links_in_a_run, dangling_links, existing_files, inputs_in_the_way, homes)


def _new_files(samples: Samples, out: Path) -> list[list[str]]:
    """Commands that write one new file, or directory."""
    encoder, classifier = str(samples.finished["pretrain"]), str(samples.finished["finetune"])
    return [
        ["convert", encoder, str(out / "new")],
        ["convert", encoder, str(out / "new.safetensors"), "--to", "fcmae"],
        ["convert", encoder, str(out / "new.pth"), "--to", "fair"],
        ["predict", classifier, str(samples.images), "--csv", str(out / "new.csv"), "--num_workers", "0"],
        ["report", encoder, "--out", str(out / "new.html")],
    ]


def _into(samples: Samples, out: Path) -> list[list[str]]:
    """Commands that write several files into a directory."""
    run, data = str(samples.finished["pretrain"]), ["--num_workers", "0", "--out", str(out)]
    return [
        ["evaluate", run, "--data", str(samples.labelled), "--probes", "knn", *data],
        ["embed", run, "--images", str(samples.images), "--map", "none", *data],
        ["analyze", run, "--images", str(samples.images), *data],
        ["convert", run, str(out)],
    ]


def write(path: Path) -> Snapshot:
    path.write_text(f"of the user: {path}")
    return {path.name: path.read_bytes()}


def plant(root: Path, rng: random.Random, places: list[str]) -> Snapshot:
    """Write a user's files to some of the places that are free; returns them."""
    planted: Snapshot = {}
    root.mkdir(parents=True, exist_ok=True)
    for place in rng.sample(places, rng.randint(1, min(3, len(places)))):
        path = root / place
        parents = [parent for parent in path.parents if parent != root and root in parent.parents]
        if path.exists() or any(parent.is_file() for parent in parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        planted[place] = path.read_bytes()
    return planted


def snapshot(root: Path) -> Snapshot:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check(words: list[str], folder: Path, root: Path, kept: Snapshot) -> str | None:
    """What is wrong with a command, or with files below `root` after it."""
    wrong = fault(command(words, folder))
    after = snapshot(root)
    lost = [name for name, content in kept.items() if after.get(name) != content]
    # A log that lies beside a copied config.yaml is gone on with: nothing of it is lost.
    lost = [name for name in lost if Path(name).name != "train.log" or not after.get(name, b"").startswith(kept[name])]
    if lost:
        wrong = f"{'deleted' if lost[0] not in after else 'changed'}: {', '.join(lost[:3])}"
    return wrong and f"{words[0]}{' --overwrite' * ('--overwrite' in words)}: {wrong}"
