"""Files of others: what stands beside their weights, where these are, and damage of every kind."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fcmae.networks.spec import ConvNeXtSpec
from fcmae.weights.files import read_weights, save_weights
from fcmae.weights.formats import Architecture, to_state
from fcmae.weights.record import ImageRecord, Weights
from fcmae.weights.tensors import digest, load_tensors

SPEC = ConvNeXtSpec(depths=(1, 1), dims=(4, 6))
EMPTY: dict[str, Tensor] = {}


def state_dict() -> dict[str, Tensor]:
    """An encoder as the released dense code has it."""
    ours = {name: torch.randn(shape) for name, shape in Architecture(SPEC).shapes().items()}
    return to_state(ours, SPEC, "fair")


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """What torch writes, around a pickle of any bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **entries}.items():
            file.writestr(f"a/{name}", content)
    return buffer.getvalue()


# What stands beside weights


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(output_dir=Path("/runs/a"), lr=1e-4),
        PureWindowsPath("c:/runs"),
        {PurePosixPath("a"): 1},
        {"best": np.float64(83.1), "epoch": np.int64(3), "dtype": np.dtype("f4"), "of": np.float32, "ok": np.bool_(1)},
        {"rng": np.random.RandomState(0).get_state()},
    ],
    ids=["flags with a path", "a Windows path", "a path as a key", "numpy's scalars", "numpy's random state"],
)
def test_what_training_code_keeps_beside_weights_is_let_through(tmp_path: Path, beside: object, zipped: bool) -> None:
    state = state_dict()
    content = {"model": state, "args": beside}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "a.pth")
    assert all(torch.equal(read.state[f"encoder.{name}"], value) for name, value in state.items())


def test_the_checkpoints_of_mmengine_and_deepspeed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = types.ModuleType("mmengine.logging.history_buffer")
    buffer = type("HistoryBuffer", (), {"__module__": logs.__name__})
    logs.HistoryBuffer = buffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, logs.__name__, logs)
    losses = buffer()
    losses.__dict__ |= {"_log_history": np.ones(3), "_count_history": np.ones(3, np.int64), "_max_length": 10_000}
    state = state_dict()
    hub = {"log_scalars": OrderedDict({"train/loss": losses}), "runtime_info": OrderedDict(), "resumed_keys": {}}
    torch.save({"meta": {"epoch": 1}, "state_dict": state, "message_hub": hub}, tmp_path / "epoch_1.pth")
    torch.save(
        {"module": state, "buffer_names": [], "ds_config": {}, "optimizer": None, "dp_world_size": 8},
        tmp_path / "mp_rank_00_model_states.pt",
    )
    for path in tmp_path.iterdir():
        found, _ = load_tensors(path)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath", "PurePosixPath"])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_any_system_and_any_python_are_let_through(tmp_path: Path, module: str, kind: str) -> None:
    # {"epoch": <path>} without weights: the refusal is of that.
    (tmp_path / "a.pth").write_bytes(archive(b"\x80\x02}X\x05\0\0\0epochc%b\n%b\nX\1\0\0\0a\x85Rs." % (
        module.encode(), kind.encode())))  # fmt: skip
    with pytest.raises(ValueError, match=r"holds no weights \(it has 'epoch'\)"):
        load_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("posix.system", b"\x80\x02cposix\nsystem\nX\4\0\0\0true\x85R."),
        ("shutil.rmtree", b"\x80\x02cshutil\nrmtree\nX\1\0\0\0a\x85R."),
        ("pathlib.os.system", b"\x80\x02cpathlib\nos.system\nX\4\0\0\0true\x85R."),
        ("torch.hub.load", b"\x80\x02ctorch.hub\nload\nX\1\0\0\0a\x85R."),
    ],
)
def test_a_refusal_names_the_class(tmp_path: Path, name: str, pickled: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(archive(pickled))
    with pytest.raises(ValueError, match=rf"a\.pth holds more than tensors \({name}\) and was not loaded: save its"):
        load_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("beside", [torch.tensor(7), None, {"state": {0: {"exp_avg": torch.ones(3)}}}, "text", [1]])
def test_what_is_no_weight_among_weights_is_left_out_and_said(
    tmp_path: Path, beside: object, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_dict()
    torch.save({"model": state | {"beside": beside, "criterion.weight": torch.ones(2)}}, tmp_path / "a.pth")
    assert len(read_weights(tmp_path / "a.pth").state) == len(state)
    torch.save(state | {"beside": beside}, tmp_path / "b.pth")
    assert len(read_weights(tmp_path / "b.pth").state) == len(state)
    assert isinstance(beside, dict) or "left out, as they are no weights: beside" in caplog.text
    assert "left out, as they are no part of the network: criterion.weight" in caplog.text


def test_names_that_a_terminal_would_obey_are_shown_as_escapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state_dict() | {"\x1b[31m": torch.ones(2), "\x1b[32m": 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"extra: \\x1b\[31m") as error:
        read_weights(tmp_path / "a.pth")
    assert "\x1b" not in str(error.value) + caplog.text


# Where the weights are


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"model_ema": 0}, "has weights under 'model_ema': name one with --key"),
        ({"net": 0, "epoch": 3, "loss": torch.ones(2)}, "has weights under 'net': name one with --key"),
        ({"teacher": 0, "student": 0}, "has weights under 'teacher', 'student': name one with --key"),
        ({"checkpoint": {"net": 0}}, "has weights under 'checkpoint.net': name one with --key"),
        ({"model": {}, "model_ema": 0}, "has weights under 'model_ema'; 'model' is empty: name one with --key"),
        ({"model": {}, "optimizer": {"lr": 1}}, r"holds no weights \('model' is empty; it also has 'optimizer'\)"),
        ({"optimizer": {"lr": 1}}, r"holds no weights \(it has 'optimizer'\)"),
        ({}, r"holds no weights \(it is an empty dict\)"),
        ([1], "holds no weights: it is a list, not a dict of named tensors"),
    ],
)
def test_a_file_with_its_weights_elsewhere_says_what_it_has(tmp_path: Path, content: object, sentence: str) -> None:
    def filled(value: object) -> object:
        """Weights in the place of each 0."""
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return state_dict() if value is not None and not isinstance(value, Tensor) and value == 0 else value

    torch.save(filled(content), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth {sentence}"):
        load_tensors(tmp_path / "a.pth")


def test_a_key_and_a_prefix_name_weights_and_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = state_dict(), state_dict()
    content = {f"{who}.{name}": value for who, s in (("s", student), ("t", teacher)) for name, value in s.items()}
    torch.save(
        {"a": {"b": content}, "c": {"net." + name: value for name, value in student.items()}}, tmp_path / "a.pth"
    )
    read = read_weights(tmp_path / "a.pth", key="a.b", prefix="t")
    assert all(torch.equal(read.state[f"encoder.{name}"], value) for name, value in teacher.items())
    assert "left out, as they are no part of the network: s.downsample_layers" in caplog.text
    assert read.names["encoder.stages.0.0.dwconv.bias"] == "t.stages.0.0.dwconv.bias"
    read = read_weights(tmp_path / "a.pth", key="c")
    assert all(torch.equal(read.state[f"encoder.{name}"], value) for name, value in student.items())
    assert "reading the network under the prefix 'net.'" in caplog.text
    with pytest.raises(ValueError, match=r"under 's\.', 't\.': name one with --prefix"):
        read_weights(tmp_path / "a.pth", key="a.b")
    save_file(student, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no weights under 'ema': it has tensors only, leave --key out"):
        read_weights(tmp_path / "a.safetensors", key="ema")


# Damage


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty: copy it again"),
        (b"<html>404</html>" * 9, "is damaged or not a file that torch wrote: copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is damaged or not a file that torch wrote"),
        (pickle.dumps("text"), "is damaged or not a file that torch wrote"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "is damaged or not a file that torch wrote"),
        (archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "holds no weights: it is a list"),
        (archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x40\x85R."), "is damaged or holds no weights"),
        (archive(bytes(50_000_000), zipfile.ZIP_DEFLATED), "is a compressed archive, which torch does not write"),
        (
            archive(b"\x80\x02}\x94."),
            r"is pickled in a way that cannot be read safely \(Unsupported operand 148\): save",
        ),
    ],
    ids=[
        *("empty", "a web page", "a pointer", "a pickle", "nested pickle", "nested archive", "70 TB", "a zip bomb"),
        "a pickle of another protocol",
    ],
)
def test_a_file_that_is_none_of_torchs_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.pth {sentence}") as error:
        load_tensors(tmp_path / "a.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))


def test_tensors_that_are_more_than_their_file_are_refused(tmp_path: Path) -> None:
    # {"a": torch.Tensor.__new__(torch.Tensor, 10000, 3)}: what was in memory before, whatever it was
    content = b"\x80\x02}X\1\0\0\0actorch\nTensor\n(J\x10\x27\0\0K\3t\x81s."
    (tmp_path / "a.pth").write_bytes(archive(content))
    with pytest.raises(ValueError, match=r"a\.pth claims 120000 bytes of numbers and has \d{3}: copy it again"):
        load_tensors(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["pth", "legacy.pth", "safetensors"])
def test_files_with_changed_and_missing_bytes_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    content = {"model": state_dict(), "args": argparse.Namespace(out=Path("a"), best=np.float64(1))}
    if suffix == "safetensors":
        save_file(state_dict(), path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix == "pth")
    whole, rng = path.read_bytes(), random.Random(0)
    for i in range(60):
        changed = bytearray(whole[: rng.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(i % 3 * 2):
            changed[rng.randrange(min(len(changed), 3000))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            read_weights(path)
        except ValueError as error:
            assert str(error).startswith(str(path)), i


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [60000, 60000], "data_offsets": [0, 14_400_000_000]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
@pytest.mark.parametrize("length", [None, 2**60])
def test_a_safetensors_header_that_lies_is_one_sentence(tmp_path: Path, header: object, length: int | None) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or no safetensors file .*: copy it again"):
        load_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "x", "model_args": {"depths": [10**9] * 4, "dims": [60000] * 4}},
        {"architecture": "convnextv2_huge", "num_classes": 10**12},
        {"model_type": "convnextv2", "hidden_sizes": [60000] * 4, "depths": [10**6] * 4, "num_channels": 10**9},
    ],
)
def test_a_directory_that_claims_more_than_its_file_holds_allocates_nothing(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"stem.0.weight": torch.ones(1, 3, 4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are of no ConvNeXt in a format of"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ({"input_size": [3, 60000, 60000]}, r"input_size\.1: Input should be less than or equal to 8192"),
        ({"mean": [0.5, float("nan"), 0.5]}, r"mean\.1: Input should be a finite number"),
        ({"std": [float("inf")] * 3}, r"std\.0: Input should be a finite number"),
        ({"crop_pct": "x" * 1000}, "crop_pct: Input should be a valid number"),
    ],
)
def test_image_settings_that_no_model_has_are_one_sentence(
    tmp_path: Path, image: dict[str, object], sentence: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": image}))
    save_file(state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"not those of a timm or transformers ConvNeXt: {sentence}") as error:
        read_weights(tmp_path)
    assert "\n" not in str(error.value) and "pydantic" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_nesting_in_a_directorys_json_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "convnextv2"}')
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_weights(tmp_path)


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "convnextv2"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"b\.safetensors is missing or no file"):
        read_weights(tmp_path)


def test_a_record_of_an_impossible_network_is_refused(tmp_path: Path) -> None:
    record = {"spec": {"depths": [10**9, 1], "dims": [4, 6]}}
    torch.save({"model": state_dict(), "fcmae": json.dumps(record)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"its record 'fcmae' is not one of ours: .*less than or equal to 64"):
        read_weights(tmp_path / "a.pth")


# Checksums


def write_export(folder: Path, to: str) -> Path:
    ours = {name: torch.randn(shape) for name, shape in Architecture(SPEC).shapes().items()}
    ours["encoder.stages.0.0.dwconv.bias"].fill_(1.25)
    image = ImageRecord(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=(3, 64, 64))
    dest = folder / {"timm": "out", "transformers": "out", "fair": "out.pth"}.get(to, "out.safetensors")
    save_weights(dest, Weights(ours, Architecture(SPEC), image), to)
    return dest


def in_tensors(content: bytearray) -> None:
    content[content.index(struct.pack("<4f", *[1.25] * 4))] ^= 0x01


def in_the_record(content: bytearray) -> None:
    place = content.index(b"0.25")
    content[place : place + 4] = b"0.75"


@pytest.mark.parametrize("to", ["fcmae", "fair", "timm", "transformers"])
@pytest.mark.parametrize("damage", [in_tensors, in_the_record])
def test_a_changed_byte_in_an_export_is_noticed(tmp_path: Path, to: str, damage: Callable[[bytearray], None]) -> None:
    dest = write_export(tmp_path, to)
    file = dest / "model.safetensors" if dest.is_dir() else dest
    read_weights(dest)
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name}.* (has changed since it was written|is damaged)"):
        read_weights(dest)


def test_the_digest_is_of_names_types_shapes_bytes_and_the_text() -> None:
    one, same = {"a": torch.zeros(2, 3), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.zeros(2, 3)}
    others = [
        ({"a": torch.zeros(3, 2), "b": torch.ones(1)}, ""),
        ({"a": torch.zeros(2, 3), "c": torch.ones(1)}, ""),
        ({"a": torch.zeros(2, 3), "b": torch.ones(1).to(torch.bfloat16)}, ""),
        ({"a": torch.zeros(2, 3), "b": torch.ones(1) + 1e-6}, ""),
        (one, "text"),
    ]
    assert digest(one, "") == digest(same, "")
    assert len({digest(one, ""), *(digest(tensors, text) for tensors, text in others)}) == 6
    assert digest(EMPTY, "") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
