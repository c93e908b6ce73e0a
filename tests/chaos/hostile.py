"""Files made to do harm: images, weights, settings, histories and names."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import random
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from chaos.commands import command, different, fault, results
from chaos.corruptions import OF_ENCODERS, walk, words_of
from chaos.samples import Samples

IMAGES = 30  # a command
PEAK_MB = 1500  # of a command on small files; torch takes 600
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    -0.0,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[31m",
    [],
    {},
    [[1]],
    "9" * 9999,
)


def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
    """Make a file of one kind and give it to a command that reads such."""
    kind = rng.choice(KINDS)
    return kind.__name__, kind(samples, rng, folder)


# Images: this is a stand-in for a generator of their own.


def images(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Damaged images, and what is no file at all; prediction lists those that it can read and names the others."""
    place = folder / "images"
    place.mkdir()
    for number in range(IMAGES):
        suffix, content = mutated(rng)
        (place / f"{number}{suffix}").write_bytes(content)
    if rng.random() < 0.3:
        os.mkfifo(place / "pipe.png")
        (place / "zero.jpg").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as bound, suppress(OSError):  # its path may be too long
            bound.bind(str(place / "socket.png"))
    model = str(samples.finished["finetune"])
    outcome = command(["predict", model, str(place), "--csv", str(folder / "p.csv"), "--num_workers", "0"], folder)
    if wrong := fault(outcome):
        return wrong
    if outcome.peak_mb > PEAK_MB:
        return f"{outcome.peak_mb} MB for {IMAGES} small files"
    longest = max(map(len, outcome.text.splitlines()), default=0)
    return f"a line of {longest} letters" if longest > 1000 else None


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A suffix and a small image of it, with some bytes changed, cut or inserted."""
    pixels = np.frombuffer(rng.randbytes(12 * 10 * 3), np.uint8).reshape(12, 10, 3)
    suffix, buffer = rng.choice((".png", ".jpg", ".tif", ".bmp", ".webp", ".npy")), io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, pixels)
    elif suffix == ".tif":
        tifffile.imwrite(buffer, pixels.astype(rng.choice(("u1", "u2", "f4"))), compression=rng.choice((None, "zlib")))
    else:
        Image.fromarray(pixels).save(buffer, {".jpg": "jpeg", ".tif": "tiff"}.get(suffix, suffix[1:]))
    content = bytearray(buffer.getvalue())
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(min(len(content), rng.choice((200, 10**6))))
        change = rng.choice(("byte", "word", "cut", "insert"))
        if change == "byte":
            content[position] = rng.randrange(256)
        elif change == "word":
            content[position : position + 4] = rng.choice(
                (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xea\x60")
            )
        elif change == "cut":
            del content[max(position, 8) :]
        else:
            content[position:position] = rng.randbytes(rng.randint(1, 50))
    return suffix, bytes(content)


# Weights


def weights(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Files of weights that lie, or would run code: a sentence, unless they are as good as others."""
    canary = folder / "ran"
    make = rng.choice((pickles, headers, headers, tensors, tensors, claims))
    path, must_refuse = make(samples, rng, folder, canary)
    what = rng.choice(("pretrain", "finetune", *OF_ENCODERS))
    if what in OF_ENCODERS:
        words = words_of(what, samples, "", path, folder)
    else:
        words = [*samples.words(what, folder / "run", epochs=1), "--init", str(path)]
    outcome = command(words, folder)
    if canary.exists():
        return "it ran the code in a file of weights"
    if wrong := fault(outcome):
        return f"{make.__name__}: {wrong}"
    if outcome.peak_mb > PEAK_MB:
        return f"{make.__name__}: {outcome.peak_mb} MB for small weights"
    return f"{make.__name__}: taken for good" if must_refuse and outcome.status == 0 else None


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def pickles(samples: Samples, rng: random.Random, folder: Path, canary: Path) -> tuple[Path, bool]:
    state = load_file(samples.exports["fcmae"])
    name = rng.choice(list(state))
    code = f"open({str(canary)!r}, 'w').close()"
    storage = torch.zeros(4).untyped_storage()
    lie = (
        torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
        0,
        (9**6,) * 2,
        (1, 1),
    )
    evil = rng.choice(
        (
            Evil(os.system, f"touch {canary}"),
            Evil(eval, code),
            Evil(exec, code),
            Evil(__import__, "os"),
            Evil(Path(canary).touch),
            Evil(torch._utils._rebuild_tensor_v2, *lie, False, OrderedDict()),
            Evil(bytearray, 10**11),
        )
    )
    content = rng.choice((evil, state | {name: evil}, {"model": state, "args": evil}, {"model": state | {name: evil}}))
    path = folder / rng.choice(("w.pth", "w.pt"))
    way = rng.randrange(3)
    if way == 0 and not any(isinstance(arg, torch.storage.TypedStorage) for arg in evil.call[1]):
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == 1)
    return path, True


def headers(samples: Samples, rng: random.Random, folder: Path, canary: Path) -> tuple[Path, bool]:
    content = samples.exports["fcmae"].read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    lie = rng.randrange(9)
    if lie == 0:
        entry["data_offsets"] = rng.choice(([0, 2**60], [-4, 4], [8, 4], [0, 4], [2**63, 2**63 + 4], ["0", "4"], []))
    elif lie == 1:
        entry["shape"] = rng.choice(([2**62, 4], [-1], [2**32, 2**32], [], [1.5], "x", [1] * 5000))
    elif lie == 2:
        entry["dtype"] = rng.choice(("F64", "I64", "BOOL", "F8_E4M3", "X", 3, None))
    elif lie == 3:
        header["\x1b[31m\n"] = header.pop(name)
    elif lie == 4:
        header[name] = rng.choice(WRONG)
    elif lie == 5:
        record = json.loads(header["__metadata__"]["fcmae"])
        holder, key = rng.choice(walk(record))
        holder[key] = rng.choice((*WRONG, [3, 60000, 60000], [10**6] * 4))
        header["__metadata__"]["fcmae"] = json.dumps(record)
    elif lie == 6:
        header["__metadata__"] = rng.choice(("x", {"fcmae": "[" * 10**5}, {"fcmae": 3}, {"fcmae": "\0"}, [1]))
    text = json.dumps(header).encode()
    if lie == 7:
        text = rng.choice((b"[" * 10**5, text[: len(text) // 2], b"\xff" * 50, text.replace(b'"F32"', b'"F32', 1), b""))
    size = rng.choice((2**62, 0, len(content) * 2, len(text) - 1)) if lie == 8 else len(text)
    path = folder / "w.safetensors"
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path, lie in (0, 1, 2, 3, 4, 7, 8)


def tensors(samples: Samples, rng: random.Random, folder: Path, canary: Path) -> tuple[Path, bool]:
    """A state dict with one tensor of another kind, or another name."""
    state: dict[Any, Any] = dict(load_file(samples.exports["fcmae"]))
    name = rng.choice([key for key in state if key.startswith("encoder.")])
    value: Tensor = state[name]
    change = rng.choice(
        ("nan", "inf", "dtype", "meta", "sparse", "shape", "missing", "extra", "key", "none", "expanded")
    )
    if change in ("nan", "inf"):
        state[name] = torch.full_like(value, math.nan if change == "nan" else math.inf)
    elif change == "dtype":
        state[name] = value.to(rng.choice((torch.int64, torch.bool, torch.complex64, torch.uint8)))
    elif change == "meta":
        state[name] = value.to("meta")
    elif change == "sparse":
        state[name] = value.to_sparse()
    elif change == "shape":
        state[name] = rng.choice(
            (value[None], value.flatten()[:1], value.new_zeros(()), value.new_zeros(0), value[..., :0])
        )
    elif change == "missing":
        del state[name]
    elif change == "extra":
        state["encoder.\x1b[31m.weight"] = value
    elif change == "key":
        state[7] = state.pop(name)
    elif change == "none":
        state[name] = None
    else:
        state[name] = torch.zeros(1).expand(60000, 60000)
    path = folder / "w.pth"
    torch.save({"model": state} if rng.random() < 0.5 else state, path)
    return path, True


def claims(samples: Samples, rng: random.Random, folder: Path, canary: Path) -> tuple[Path, bool]:
    """A directory whose config.json claims something else."""
    place = samples.copy(samples.exports[rng.choice(("timm", "transformers", "classifier"))], folder)
    config = json.loads((place / "config.json").read_text())
    holder, key = rng.choice(walk(config))
    size = [3, 60000, 60000]
    holder[key] = rng.choice((*WRONG, size, [0.0] * 3, [10**6] * 4, "../../etc", "local-dir:/etc", ["\x1b[31m"] * 2))
    (place / "config.json").write_text(json.dumps(config))
    return place, False


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
    wrong = fault(outcome) or (f"{outcome.peak_mb} MB" if outcome.peak_mb > PEAK_MB else None)
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
    for value in (
        b"1e400",
        b"0x" + b"f" * 10**5,
        b"9" * 10**5,
        b"!!binary xx",
        b"!!timestamp 9999-99-99",
        b"1:60:60:" * 999,
    ):
        yield b"epochs: " + value + b"\n"
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
        line[rng.choice([*line, "step", "loss", "knn_top1", "\x1b[31m", "</script>"])] = rng.choice(WRONG)
        text = rng.choice(
            (json.dumps(line), json.dumps(line)[:-9], "[" * 10**5, "\0" * 50, "9" * 10**6, '{"step": 1e999}')
        )
        lines.insert(rng.randrange(len(lines)), text)
    path.write_text("\n".join(lines) + rng.choice(("\n", "")))
    if rng.random() < 0.5:
        (run / "evaluation").mkdir()
        content = rng.choice(
            (json.dumps({"results": rng.choice(WRONG)}), json.dumps(rng.choice(WRONG)), "[" * 10**5, "{")
        )
        (run / "evaluation" / "evaluation.json").write_text(content)
    if rng.random() < 0.5:
        page = folder / "report.html"
        outcome = command(["report", str(run), "--out", str(page)], folder)
        if wrong := fault(outcome, (0,)):
            return f"report: {wrong}"
        return "report: a name of the history is code in the page" if "</script></" in page.read_text() else None
    wrong = fault(command(samples.words(kind, run), folder), (0,))
    return wrong or different(results(run), results(samples.finished[kind]))


# Names

NAMES = (
    *(
        "a\x1b[31mb",
        "a\nb",
        "a\rb",
        "a\tb",
        "a,b",
        'a"b',
        "a'b",
        "-a",
        "--out",
        "a b ",
        "[ab]*",
        "$(touch ran)",
        "%s{}",
    ),
    *("~", "a\u202eb", "cafe\u0301", "caf\xe9", "\xfc" * 100, "<script>alert(1)</script>", "nan", "=1+1", "a\\b", "#a"),
    *(os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff\xfe"), "\U0001f431", "a\x7fb", "a\x9bb"),
)


def names(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Files and classes of any name: every image is listed once, or the name is refused before training."""
    place, some = folder / "labelled", rng.sample([name.replace("/", "_") for name in NAMES], 3)
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


KINDS = (images, images, weights, weights, weights, settings, settings, histories, histories, names, names)
