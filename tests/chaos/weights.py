"""Files of weights that lie, or would run code."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from chaos.commands import command, fault, greedy
from chaos.corruptions import OF_ENCODERS, walk, words_of
from chaos.samples import WRONG, Samples


def weights(samples: Samples, rng: random.Random, folder: Path) -> str | None:
    """Give such a file to a command: a sentence, unless it is as good as another."""
    make = rng.choice((pickles, headers, records, tensors, tensors, claims))
    path, must_refuse = make(samples, rng, folder), make not in (records, claims)
    what = rng.choice(("pretrain", "finetune", *OF_ENCODERS))
    if what in OF_ENCODERS:
        words = words_of(what, samples, "", path, folder)
    else:
        words = [*samples.words(what, folder / "run", epochs=1), "--init", str(path)]
    outcome = command(words, folder)
    wrong = "runs code" if (folder / "ran").exists() else fault(outcome) or greedy(outcome)
    if wrong is None and must_refuse and outcome.status == 0:
        wrong = "takes it for good"
    return wrong and f"{make.__name__}, {what}: {wrong}"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def pickles(samples: Samples, rng: random.Random, folder: Path) -> Path:
    """Calls, alone or beside and among the tensors."""
    state, canary = load_file(samples.exports["fcmae"]), folder / "ran"
    code, name = f"open({str(canary)!r}, 'w').close()", rng.choice(list(state))
    storage = torch.zeros(4)._typed_storage()  # type: ignore[no-untyped-call]
    calls = [Call(os.system, f"touch {canary}"), Call(eval, code), Call(exec, code), Call(canary.touch)]
    calls += [Call(__import__, "os"), Call(bytearray, 10**11)]
    calls += [Call(torch._utils._rebuild_tensor_v2, storage, 0, (9**6, 9**6), (1, 1), False, OrderedDict())]
    call = rng.choice(calls)
    path, way = folder / rng.choice(("w.pth", "w.pt")), rng.randrange(3)
    if way == 0:
        path.write_bytes(pickle.dumps(call))
    else:
        content = rng.choice((call, state | {name: call}, {"model": state | {name: call}}))
        torch.save(content, path, _use_new_zipfile_serialization=way == 1)
    return path


LIES: dict[str, list[Any]] = {
    "data_offsets": [[0, 2**60], [-4, 4], [8, 4], [0, 4], [2**63, 2**63 + 4], ["0", "4"], []],
    "shape": [[2**62, 4], [-1], [2**32, 2**32], [1.5], "x", [1] * 5000],
    "dtype": ["F64", "I64", "BOOL", "F8_E4M3", "X", 3, None],
}


def headers(samples: Samples, rng: random.Random, folder: Path) -> Path:
    """A .safetensors file whose header says what is not so, or is none."""
    header, data = _split(samples.exports["fcmae"])
    name, size = rng.choice([key for key in header if key != "__metadata__"]), None
    way = rng.randrange(5)
    if way < 2:
        key = rng.choice(list(LIES))
        header[name][key] = rng.choice(LIES[key])
    elif way == 2:
        header["\x1b[31m\n"] = header.pop(name)
    text = json.dumps(header).encode()
    if way == 3:
        text = rng.choice((b"[" * 10**5, text[: len(text) // 2], b"\xff" * 50, b"", b"{}", b"3"))
    elif way == 4:
        size = rng.choice((2**62, 0, len(text) * 20, len(text) - 1))
    return _joined(folder, text, data, size)


def records(samples: Samples, rng: random.Random, folder: Path) -> Path:
    """What a file says of itself is of another type, or out of all proportion."""
    header, data = _split(samples.exports["fcmae"])
    record = json.loads(header["__metadata__"]["fcmae"])
    holder, key = rng.choice(walk(record))
    holder[key] = rng.choice((*WRONG, [3, 60000, 60000], [10**6] * 4))
    contents = ("x", {"fcmae": "[" * 10**5}, {"fcmae": 3}, {"fcmae": "\0"}, [1])
    header["__metadata__"] = {"fcmae": json.dumps(record)} if rng.random() < 0.7 else rng.choice(contents)
    return _joined(folder, json.dumps(header).encode(), data)


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:size]), content[size:]


def _joined(folder: Path, header: bytes, data: bytes, size: int | None = None) -> Path:
    path = folder / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)
    return path


def tensors(samples: Samples, rng: random.Random, folder: Path) -> Path:
    """A state dict with one tensor of another kind, or another name."""
    state: dict[Any, Any] = dict(load_file(samples.exports["fcmae"]))
    name = rng.choice([key for key in state if key.startswith("encoder.")])
    value = state.pop(name)
    wrong = [torch.full_like(value, math.nan), torch.full_like(value, math.inf), value.to("meta"), value.to_sparse()]
    wrong += [value.flatten()[:-1], value.new_zeros(0), torch.zeros(1).expand(60000, 60000), None, [], "x"]
    wrong += [value.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8)]
    named: list[dict[Any, Any]] = [{}, {name: value, "encoder.\x1b[31m.weight": value}, {7: value}, {None: value}]
    state |= rng.choice(named) if rng.random() < 0.2 else {name: rng.choice(wrong)}
    path = folder / "w.pth"
    torch.save({"model": state} if rng.random() < 0.5 else state, path)
    return path


def claims(samples: Samples, rng: random.Random, folder: Path) -> Path:
    """A directory whose config.json claims something else."""
    place = samples.copy(samples.exports[rng.choice(("timm", "transformers", "classifier"))], folder)
    config = json.loads((place / "config.json").read_text())
    holder, key = rng.choice(walk(config))
    sizes = ([3, 60000, 60000], 60000, [10**6] * 4)
    holder[key] = rng.choice((*WRONG, *sizes, [0.0] * 3, "../../etc", "local-dir:/etc", ["\x1b[31m"] * 2))
    (place / "config.json").write_text(json.dumps(config))
    return place
