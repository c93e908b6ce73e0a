"""Tensors in files: read from untrusted ones without running code, mapped into memory, and no more than they hold.

.pth files are unpickled with weights_only. What training code keeps beside them (flags, paths, numpy's numbers, logs)
becomes a `_Beside`, which does nothing and holds nothing; every other class is refused.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fcmae.data.source import few, one_line, printable

logger = logging.getLogger("fcmae")

RECORD = "fcmae"  # the key of the record in our own files
STATE_KEYS = ("model", "state_dict", "module", "model_state_dict")  # where training code keeps a model's weights


class _Beside:
    """Stands for anything in a file besides its weights: nothing of it is run or kept."""

    def __new__(cls, *_: object) -> _Beside:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_NUMPY = [
    "dtype",
    "ndarray",
    *(f"{module}.{name}" for module in ("core.multiarray", "_core.multiarray") for name in ("scalar", "_reconstruct")),
    "bool_",
    *sorted({np.dtype(code).type.__name__ for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}),
]
_PATHS = [kind + "Path" for kind in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")]
_HARMLESS = [
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),  # ._local: Python 3.13's
    *(f"numpy.{name}" for name in _NUMPY),
    "mmengine.logging.history_buffer.HistoryBuffer",  # of losses
]


def load_tensors(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], str | None]:
    """The floating-point tensors of a file by name, and our record of it or None.

    Args:
        path: a .safetensors file, or one that torch wrote.
        key: the entry of the file that holds them, "a.b" for one inside another; None takes one of STATE_KEYS, or the
            file itself.

    Raises:
        ValueError: if the file cannot be read, holds more than is safe, has no weights there, or has incomplete ones.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing or no file: copy it again")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: copy it again")
    content, record = _open_safetensors(path) if path.suffix == ".safetensors" else (_open_torch(path), None)
    if isinstance(content, dict) and RECORD in content:
        record = content.pop(RECORD)
    state = _chosen(path, content, key)
    tensors = {name: value for name, value in state.items() if _is_weight(name, value)}
    for name, tensor in tensors.items():
        if why := _not_whole(tensor):
            raise ValueError(f"{path}: its entry {name!r} {why}: save a plain state dict")
    # A pickle can make tensors from nothing, of any size.
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    claimed, size = sum({each.data_ptr(): each.nbytes() for each in storages}.values()), path.stat().st_size
    if claimed > size:
        raise ValueError(f"{path} claims {claimed} bytes of numbers and has {size}: copy it again")
    # Other sets of weights in the file have been reported already.
    if others := [str(name) for name, value in state.items() if name not in tensors and not isinstance(value, dict)]:
        logger.warning("%s: left out, as they are no weights: %s", path, few(others))
    return tensors, record


def read_record(path: Path) -> str | None:
    """Our record of a file of weights, as it stands there; None of files that others wrote.

    Args:
        path: a .safetensors file, or one that torch wrote.

    Raises:
        SafetensorError, OSError, ValueError: if the file cannot be read.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(RECORD)
    content = _open_torch(path)
    return content.get(RECORD) if isinstance(content, dict) else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file that whoever may read the user's other new files may read.

    Tensors that share memory, as tied weights do, are stored each for itself.

    Args:
        path: of the file.
        tensors: by name.
        metadata: for the file's header, beside the format.

    Raises:
        OSError: if it cannot be written.
    """
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        memory = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if memory in seen else value
        seen.add(memory)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(separate, path, {"format": "pt"} | (metadata or {}))  # which lets its owner alone read it
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """A SHA-256, in hexadecimal digits, of named tensors and of a text that goes with them.

    Args:
        tensors: on the CPU; their order does not matter.
        text: goes into the digest too.
    """
    sha256 = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="backslashreplace"))
        sha256.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(RECORD)
        return load_file(path), record
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({one_line(error)}): copy it again") from error


def _open_torch(path: Path) -> object:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                compressed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
            if compressed:  # mapped, it would be read as it is; unpacked, it may be of any size
                raise ValueError(f"{path} is a compressed archive, which torch does not write: unpack it first")
        with torch.serialization.safe_globals([(_Beside, name) for name in _HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(_damaged(path, error)) from error
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors ({printable(refused[1])}) and was not loaded: save its state dict "
                "alone"
            ) from error
        unknown = re.search(r"Unsupported operand \d+", str(error))
        if unknown and zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is pickled in a way that cannot be read safely ({unknown[0]}): save its state dict with "
                "torch.save and its own pickle_protocol"
            ) from error
        raise ValueError(_damaged(path, error)) from error
    except Exception as error:  # whatever damaged bytes make torch, pickle and zipfile raise
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    if not zipfile.is_zipfile(path):
        return f"{path} is damaged or not a file that torch wrote: copy it again"
    return f"{path} is damaged or holds no weights ({one_line(str(error) or type(error).__name__)}): copy it again"


def _chosen(path: Path, content: object, key: str | None) -> Mapping[Any, Any]:
    """The state dict under the given key of a file, or the usual one."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights: it is a {type(content).__name__}, not a dict of named tensors")
    sets = dict(_sets(content))
    # If the file is a state dict itself, entries may be dicts of other tensors.
    bare = _num_weights(content) > max(map(_num_weights, sets.values()), default=0)
    chosen = key or next((name for name in STATE_KEYS if name in sets), None)
    if chosen in sets:
        if others := [repr(name) for name in sets if name != chosen]:
            logger.warning("%s: reading %r; it also has %s (--key)", path, chosen, few(others))
        return sets[chosen]
    if key is None and bare:
        return content
    empty = [f"{name!r} is empty" for name, value in content.items() if value in ({}, None) and name in STATE_KEYS]
    if sets and key:
        raise ValueError(f"{path} has no weights under {key!r}: --key names one of {few(map(repr, sets))}")
    if sets:
        named = f"weights under {few(map(repr, sets))}"
        raise ValueError(f"{path} has {'; '.join([named, *empty])}: name one with --key")
    if bare:
        raise ValueError(f"{path} has no weights under {key!r}: it has tensors only, leave --key out")
    others = [repr(name) for name, value in content.items() if not (value in ({}, None) and name in STATE_KEYS)]
    listed = "; ".join([*empty, f"it {'also ' if empty else ''}has {few(others)}"] if others else empty)
    raise ValueError(f"{path} holds no weights ({listed or 'it is an empty dict'}): save a model's state dict")


def _sets(content: Mapping[Any, Any], depth: int = 2) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Dicts with tensors in a file, by their keys, or those one level further inside where there are none."""
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict):
            if _num_weights(value):
                yield name, value
            elif depth > 1:
                yield from ((f"{name}.{inner}", found) for inner, found in _sets(value, depth - 1))


def _num_weights(content: Mapping[Any, Any]) -> int:
    return sum(_is_weight(name, value) and value.ndim > 0 for name, value in content.items())


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()


def _not_whole(tensor: Tensor) -> str:
    """Why a tensor has fewer numbers than its shape says; empty if it has them all."""
    if tensor.is_meta:
        return "is a meta tensor, which has no numbers"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
        return "is no dense tensor"
    if tensor.untyped_storage().nbytes() < tensor.nbytes:  # an expanded one
        return f"claims {tuple(tensor.shape)} and stores {tensor.untyped_storage().nbytes()} bytes"
    return ""
