"""Files made to do harm: images, settings, histories and names; weights are in a module of their own."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from chaos.commands import command, different, fault, greedy, results
from chaos.corruptions import OF_ENCODERS, words_of
from chaos.images import bombs, mutated
from chaos.samples import WRONG, Samples
from chaos.weights import weights

IMAGES = 30  # a command


def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
    """Make a file of one kind and give it to a command that reads such."""
    kind = rng.choice((images, weights, weights, settings, histories, names))
    return kind.__name__, kind(samples, rng, folder)


# Images


def images(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Damaged images, and what is no file at all: those that can be read are predicted, the others named."""
    place = folder / "images"
    place.mkdir()
    for number, (suffix, content) in enumerate(islice(mutated(rng.randrange(2**32)), IMAGES)):
        (place / f"{number}{suffix}").write_bytes(content)
    if rng.random() < 0.3:
        name, content = rng.choice(list(bombs().items()))
        (place / name).write_bytes(content)
    if rng.random() < 0.3:
        os.mkfifo(place / "pipe.png")
        (place / "zero.jpg").symlink_to("/dev/zero")
    outcome = command(["predict", str(samples.finished["finetune"]), str(place), "--num_workers", "0"], folder)
    longest = max(map(len, outcome.text.splitlines()), default=0)
    said = fault(outcome, (0, 1, 2))  # 1: some of the images cannot be read
    return said or greedy(outcome) or (f"a line of {longest} letters" if longest > 1000 else None)


# Settings


def settings(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """YAML bombs and worse, given as --config and as the config.yaml of a run."""
    canary = folder / "ran"
    content = rng.choice(list(yaml_files(rng, canary, (samples.finished["pretrain"] / "config.yaml").read_text())))
    if rng.random() < 0.5:
        path = folder / "settings.yaml"
        path.write_bytes(content)
        name = rng.choice(("pretrain", "finetune", "evaluate", "report", "bench"))
        words = [name, "--config", str(path), "--print_config"]
    else:
        run = samples.copy(samples.finished["pretrain"], folder)
        (run / "config.yaml").write_bytes(b"# fcmae pretrain 0.1.0\n" + content)
        what = rng.choice(("resume", "report", *OF_ENCODERS))
        words = words_of(what, samples, "pretrain", run, folder)
    outcome = command(words, folder)
    if canary.exists():
        return "it ran the code in a file of settings"
    wrong = fault(outcome) or greedy(outcome)
    return wrong and f"{words[0]}, {content[:40]!r}...: {wrong}"


def yaml_files(rng: random.Random, canary: Path, usual: str) -> Iterator[bytes]:
    laughs = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 12))
    yield f"k0: &k0 x\n{laughs}data: {{path: *k11}}\n".encode()
    yield b"data: &d {path: *d}\n"
    yield b"&a [*a]\n"
    yield b"data: {path: &p [*p, x]}\n"
    yield f"data: {{path: !!python/object/apply:os.system ['touch {canary}']}}\n".encode()
    yield f"out: !!python/object/new:pathlib.Path ['{canary}']\n".encode()
    merged = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
    yield f"m0: &m0 {{a: 1}}\n{merged}".encode()
    for opening in (b"[", b"{a: ", b"- ", b"!a ", b"? "):
        yield opening * rng.choice((100, 100_000))
    for value in ("1e400", "0x" + "f" * 10**5, "9" * 10**5, "!!binary xx", "!!timestamp 9999-99-99", "1:60:" * 999):
        yield f"epochs: {value}\n".encode()
    yield b"\0\xff\xfe" + rng.randbytes(500)
    yield usual.encode("utf-16")
    yield b"# caf\xe9\n" + usual.encode()
    yield usual.encode() + b"---\n" + usual.encode()
    yield b"\x1b[31m: \x1b[31m\n"
    yield b'"\\e[31m": "\\e[31m"\n'
    lines = usual.splitlines()
    for _ in range(20):
        number = rng.randrange(1, len(lines))
        changed = f"{lines[number].partition(':')[0]}: {json.dumps(rng.choice(WRONG))}"
        yield "\n".join([*lines[:number], changed, *lines[number + 1 :]]).encode()


# Histories


def histories(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Lines of metrics.jsonl and evaluations of any type: a report is written, a run goes on as if without."""
    kind = rng.choice(("pretrain", "finetune"))
    run = samples.copy(samples.cut[kind], folder)
    path = run / "metrics.jsonl"
    usual = path.read_text().splitlines()
    lines = list(usual)
    for _ in range(rng.randint(1, 3)):
        line = json.loads(rng.choice(usual)) if rng.random() < 0.7 else {}
        line[rng.choice([*line, "step", "loss", "knn_top1", "\x1b[31m", "</script><b>"])] = rng.choice(WRONG)
        texts = (json.dumps(line), json.dumps(line)[:-9], "[" * 10**5, "\0" * 50, "9" * 10**6, '{"step": 1e999}')
        lines.insert(rng.randrange(len(lines)), rng.choice(texts))
    path.write_text("\n".join(lines) + rng.choice(("\n", "")))
    if rng.random() < 0.5:
        (run / "evaluation").mkdir()
        contents = ("[" * 10**5, "{", json.dumps(rng.choice(WRONG)), json.dumps({"results": rng.choice(WRONG)}))
        (run / "evaluation" / "evaluation.json").write_text(rng.choice(contents))
    if rng.random() < 0.5:
        page = folder / "report.html"
        outcome = command(["report", str(run), "--out", str(page)], folder)
        if wrong := fault(outcome, (0,)):
            return f"report: {wrong}"
        return "report: a name of the history is code in the page" if "</script><b>" in page.read_text() else None
    wrong = fault(command(samples.words(kind, run), folder), (0,))
    return wrong or different(results(run), results(samples.finished[kind]))


# Names

NAMES = [
    *("a\x1b[31mb", "a\nb", "a\rb", "a\tb", "a,b", 'a"b', "a'b", "-a", "--out", "a b ", "[ab]*", "$(touch ran)", "%s"),
    *("~", "a\u202eb", "cafe\u0301", "caf\xe9", "\xfc" * 100, "<script>alert(1)<", "nan", "=1+1", "a\\b", "#a"),
    *(os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff\xfe"), "\U0001f431", "a\x7fb", "a\x9bb"),
]


def names(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Files and classes of any name: every image is listed once, or the name is refused before training."""
    place, some = folder / "labelled", rng.sample(NAMES, 3)
    for class_name in some[:2]:
        (place / class_name).mkdir(parents=True)
        for number in range(6):
            image = samples.images / "01.png"
            (place / class_name / f"{number}{some[2]}.png").write_bytes(image.read_bytes())
    said = f"{some!a}: "
    if rng.random() < 0.5:
        words = samples.words("pretrain", folder / "run")
        words[words.index("--data.path") + 1] = str(place)
        outcome = command(words, folder)
        return (wrong := fault(outcome)) and said + wrong
    words = samples.words("finetune", folder / "run")
    words[words.index("--data.path") + 1] = str(place)
    outcome = command(words, folder)
    wrong = fault(outcome)
    if wrong is None and outcome.status == 0:
        for what in ("predict", "report", "convert"):
            words = words_of(what, samples, "", folder / "run", folder)
            words = [str(place) if word == str(samples.images) else word for word in words]
            wrong = wrong or fault(command(words, folder), (0,))
        if wrong is None:
            with (folder / "p.csv").open(newline="", errors="surrogateescape") as file:
                listed = len(list(csv.reader(file))) - 1
            wrong = None if listed == 12 else f"{listed} of 12 images are listed"
        if wrong is None and "<script>alert" in (folder / "report.html").read_text(errors="replace"):
            wrong = "a class's name is code in the page"
    return wrong and said + wrong
