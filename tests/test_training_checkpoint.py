"""Checkpoints hold everything, are whole or absent, and say what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import assert_same
from safetensors import SafetensorError
from torch import nn

import fcmae
from fcmae.atomic import sha256_of
from fcmae.training import checkpoint
from fcmae.training.checkpoint import Meta, check_origin, latest, prune, read_meta, read_tensors, restore, save, steps
from fcmae.training.optim import parameter_groups
from fcmae.weights import tensors

NO_OTHER_NAMES = str  # of the parameters in format 1


def trained(num_steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01)
    step(model, optimizer, num_steps)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for seed in range(num_steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def write(run: Path, number: int = 7, config: dict[str, Any] | None = None, **fields: Any) -> Path:
    model, optimizer = trained()
    meta = Meta("pretrain", number, config or {"seed": 3}, "fingerprint", **fields)
    return save(run, meta, {"model": model.state_dict(), "optimizer": checkpoint.optimizer_state(optimizer, model)})


def test_a_restored_model_trains_on_as_the_saved_one(tmp_path: Path) -> None:
    model, optimizer = trained()
    meta = Meta("pretrain", 3, {}, "fingerprint")
    place = save(
        tmp_path, meta, {"model": model.state_dict(), "optimizer": checkpoint.optimizer_state(optimizer, model)}
    )
    other, other_optimizer = trained(num_steps=0)
    restore(place, other, other_optimizer, NO_OTHER_NAMES)
    assert replace(read_meta(place), checksums={}) == meta
    for net, adamw in ((model, optimizer), (other, other_optimizer)):
        step(net, adamw, 4)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(checkpoint.optimizer_state(other_optimizer, other), checkpoint.optimizer_state(optimizer, model))
    assert float(checkpoint.optimizer_state(other_optimizer, other)["0.weight/step"]) == 7


def test_names_that_are_no_unicode_are_read_again(tmp_path: Path) -> None:
    config = {"data": {"path": [os.fsdecode(b"caf\xe9")]}}
    assert read_meta(write(tmp_path, config=config)).config == config


def test_what_is_deleted_first_is_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(100, 1000)
    place = tmp_path / checkpoint.DIRECTORY / "step-00000001"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="do not fit"):
        checkpoint.check_space(tmp_path, model, 1)
    assert checkpoint.check_space(tmp_path, model, 1, overwrites=True)


def test_tied_weights_are_stored_and_restored(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters())

    net, other = tied(), tied()
    optimizer = adamw(net)
    step(net, optimizer, 1)
    tensors = {"model": net.state_dict(), "optimizer": checkpoint.optimizer_state(optimizer, net)}
    place = save(tmp_path, Meta("pretrain", 1, {}, "fingerprint"), tensors)
    restore(place, other, adamw(other), NO_OTHER_NAMES)
    assert_same(other.state_dict(), net.state_dict())
    assert other[1].weight is other[0].weight


def test_a_checkpoint_of_format_1_is_restored_under_its_names_and_in_its_shapes(tmp_path: Path) -> None:
    """As earlier versions wrote it: some names were others, and a Linear layer was a 1x1 convolution."""

    def earlier(name: str) -> str:
        return name.replace("0.", "first.")

    model, optimizer = trained()
    state, moments = model.state_dict(), checkpoint.optimizer_state(optimizer, model)
    old = {
        kind: {
            earlier(name): value[..., None, None] if name.startswith("1.") and value.ndim == 2 else value
            for name, value in flat.items()
        }
        for kind, flat in (("model", state), ("optimizer", moments))
    }
    place = save(tmp_path, Meta("pretrain", 3, {}, "fingerprint", format=1), old)
    meta = json.loads((place / "checkpoint.json").read_text())
    del meta["spec"], meta["checksums"]
    (place / "checkpoint.json").write_text(json.dumps(meta))
    other, other_optimizer = trained(num_steps=0)
    restore(place, other, other_optimizer, earlier)
    for net, adamw in ((model, optimizer), (other, other_optimizer)):
        step(net, adamw, 4)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(checkpoint.optimizer_state(other_optimizer, other), checkpoint.optimizer_state(optimizer, model))


def test_a_checkpoint_is_safetensors_and_json_that_says_what_it_is(tmp_path: Path) -> None:
    place = write(tmp_path, progress={"best": 0.5}, spec={"depths": [1, 1]})
    assert place == tmp_path / "checkpoints" / "step-00000007"
    assert {path.name for path in place.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "checkpoint.json",
    }
    content = json.loads((place / "checkpoint.json").read_text())
    checksums = content.pop("checksums")
    assert checksums.keys() == {"model.safetensors", "optimizer.safetensors", "checkpoint.json"}
    assert checksums["model.safetensors"] == sha256_of(place / "model.safetensors")
    assert content == {
        "kind": "pretrain",
        "step": 7,
        "config": {"seed": 3},
        "data_fingerprint": "fingerprint",
        "progress": {"best": 0.5},
        "spec": {"depths": [1, 1]},
        "format": 2,
        "version": fcmae.__version__,
    }
    assert read_tensors(place, "optimizer").keys() == {
        f"{name}/{key}" for name in read_tensors(place, "model") for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    place = write(tmp_path)
    before = (place / "checkpoint.json").stat().st_mtime_ns
    assert write(tmp_path) == place
    assert (place / "checkpoint.json").stat().st_mtime_ns == before


class Cut(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("operation", ["save_file", "sync", "rename"])
def test_a_save_that_is_cut_off_leaves_no_checkpoint_and_does_not_hinder_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    write(tmp_path, 1)
    target = {"save_file": tensors, "sync": checkpoint, "rename": Path}[operation]

    def cut(*_: object, **__: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(target, operation, cut)
        with pytest.raises(Cut):
            write(tmp_path, 2)
    assert list(steps(tmp_path)) == [1]
    write(tmp_path, 2)
    assert list(steps(tmp_path)) == [1, 2]
    prune(tmp_path, 2, 1, 0)
    assert not list(tmp_path.glob("checkpoints/.tmp-*"))


@pytest.mark.parametrize(
    ("keep", "milestone", "expected"),
    [(1, 0, [9]), (2, 0, [6, 9]), (1, 4, [4, 9]), (2, 3, [3, 6, 9]), (9, 0, [3, 4, 6, 9])],
)
def test_the_newest_and_the_milestones_stay(tmp_path: Path, keep: int, milestone: int, expected: list[int]) -> None:
    for number in (3, 4, 6, 9):
        (tmp_path / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-notes").mkdir()  # not ours
    prune(tmp_path, keep, 1, milestone)
    assert list(steps(tmp_path)) == expected
    assert (tmp_path / "checkpoints" / "step-notes").exists()


def test_milestones_stay_where_the_setting_is_another_by_now(tmp_path: Path) -> None:
    for number, every in ((4, 2), (6, 2), (8, 2), (10, 3), (12, 0), (14, 0)):
        write(tmp_path, number, {"checkpoint": {"milestone_epochs": every}})
    prune(tmp_path, 1, 2, 0)  # of two steps an epoch
    assert list(steps(tmp_path)) == [4, 8, 14]


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1), write(tmp_path, 2)

    def cut(path: Path, **_: object) -> None:
        next(path.iterdir()).unlink()
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(Cut):
            prune(tmp_path, 1, 1, 0)
    assert list(steps(tmp_path)) == [2]
    prune(tmp_path, 1, 1, 0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for number in (99999999, 100000000, 2):
        (tmp_path / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
    assert list(steps(tmp_path)) == [2, 99999999, 100000000]
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-100000000"
    assert latest(tmp_path / "absent") is None


def test_other_images_are_refused(tmp_path: Path) -> None:
    place = write(tmp_path)
    with pytest.raises(ValueError, match=r"data.path no longer gives the images of .*step-00000007"):
        check_origin(place, "pretrain", "other")
    with pytest.raises(ValueError, match=r"data.path and data.val_path no longer gives the images of"):
        check_origin(place, "pretrain", "other", ["data.path", "data.val_path"])
    with pytest.raises(
        ValueError, match=r"step-00000007 is of another kind of run, pretrain and not finetune: restore"
    ):
        check_origin(place, "finetune", "fingerprint")
    check_origin(place, "pretrain", "fingerprint")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a checkpoint of fcmae: checkpoint.json: .*No such file"),
        ("{", "is not a checkpoint of fcmae"),
        ("[" * 100_000, "is not a checkpoint of fcmae: checkpoint.json: recursion limit exceeded"),
        (" " * 20_000_000, "is not a checkpoint of fcmae: checkpoint.json: .*it has more than 16,777,216 bytes"),
        ("\0\1\2", "is not a checkpoint of fcmae: checkpoint.json: expected value"),
        ("1" * 10_000, "is not a checkpoint of fcmae: checkpoint.json: number out of range"),
        ("[]", "is not a checkpoint of fcmae"),
        ("{}", "is not a checkpoint of fcmae"),
        ('{"format": 1, "version": "1", "colour": "red"}', "is not a checkpoint of fcmae"),
        ('{"format": 3, "version": "9.0", "colour": "red"}', "has format 3, .* reads up to 2: use fcmae 9.0"),
    ],
)
def test_what_is_no_checkpoint_of_this_format_is_said_in_a_sentence(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_meta(tmp_path)


def test_damaged_tensors_are_said_in_a_sentence(tmp_path: Path) -> None:
    place = write(tmp_path)
    file = place / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"optimizer.safetensors has changed since it was written: restore "):
        restore(place, *trained(), NO_OTHER_NAMES)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda state: state.update({"0.weight/exp_avg": torch.zeros(1)}),
            r"0\.weight/exp_avg is \(1,\) float32 and not",
        ),
        (
            lambda state: state.update({"0.weight/step": torch.zeros((), dtype=torch.float64)}),
            r"is \(\) float64 and not",
        ),
        (lambda state: state.pop("0.bias/exp_avg_sq"), r"0\.bias/exp_avg_sq is missing"),
        (lambda state: state.update({"9.weight/step": torch.zeros(())}), r"9\.weight/step belongs to nothing"),
        (dict.clear, r"0\.weight/step is missing.* and \d+ more"),
    ],
)
def test_moments_that_do_not_fit_are_refused_before_adamw_reads_them(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    """The fused AdamW checks nothing: moments that are too small made it read beyond their end."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = checkpoint.optimizer_state(optimizer, model)
    change(state)
    with pytest.raises(ValueError, match=problem):
        checkpoint.load_optimizer_state(optimizer, model, state, tmp_path / "optimizer.safetensors")


def test_a_parameter_that_never_got_a_gradient_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    def made() -> tuple[nn.ModuleDict, torch.optim.AdamW]:
        model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = made()
    model["used"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = checkpoint.optimizer_state(optimizer, model)
    again, adamw = made()
    checkpoint.load_optimizer_state(adamw, again, state, tmp_path / "optimizer.safetensors")
    found = checkpoint.optimizer_state(adamw, again)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(250_000, 1, bias=False)  # of a megabyte: three with AdamW's moments
    for free, fits in ((9_000_000, True), (8_999_999, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: shutil._ntuple_diskusage(0, 0, free))
        if fits:
            needs = checkpoint.check_space(tmp_path / "run", model, 2)
            assert needs == "checkpoints take up to 9 MB of 0.0 GB free"
            continue
        with pytest.raises(ValueError, match="3 checkpoints of 3 MB do not fit, as the disk has 9 MB free: make room"):
            checkpoint.check_space(tmp_path / "run", model, 2)
    assert not (tmp_path / "run").exists()


def test_room_is_looked_for_where_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bigger").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "bigger")
    free = {tmp_path / "bigger": 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, free.get(Path(place), 0)))
    assert "of 1.0 GB free" in checkpoint.check_space(tmp_path / "run", nn.Linear(2, 2), 2)


def without_checksums(place: Path) -> dict[str, Any]:
    """As earlier versions wrote it; returns the fields."""
    meta = json.loads((place / "checkpoint.json").read_text())
    del meta["checksums"]
    (place / "checkpoint.json").write_text(json.dumps(meta))
    return dict(meta)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
def test_a_bit_that_flips_anywhere_in_a_checkpoint_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path, 6)
    file = write(tmp_path) / name
    content = file.read_bytes()
    # The indentation of JSON says nothing.
    places = [i for i in range(0, len(content), max(1, len(content) // 97)) if content[i : i + 1] not in (b" ", b"\n")]
    assert len(places) > 60
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(
            ValueError, match=r"step-00000007.* (has changed since|is not a checkpoint|is of step|has format 3)"
        ):
            restore(file.parent, *trained(), NO_OTHER_NAMES)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"step-00000007.* (has changed since|is not a checkpoint)"):
        restore(file.parent, *trained(), NO_OTHER_NAMES)
    file.write_bytes(content)
    restore(file.parent, *trained(), NO_OTHER_NAMES)


def test_what_to_do_about_a_damaged_checkpoint_depends_on_the_others(tmp_path: Path) -> None:
    place = write(tmp_path)
    (place / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"model.safetensors has .*: restore .*step-00000007 from a copy, or begin anew"
    ):
        read_tensors(place, "model")
    write(tmp_path, 6)
    with pytest.raises(
        ValueError, match=r"written: delete .*step-00000007 to go on from an earlier one, step-00000006$"
    ):
        read_tensors(place, "model")


def test_a_checkpoint_without_checksums_still_reads(tmp_path: Path) -> None:
    place = write(tmp_path)
    without_checksums(place)
    restore(place, *trained(), NO_OTHER_NAMES)
    file = place / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"optimizer.safetensors cannot be read .*: restore .*step-00000007"):
        restore(place, *trained(), NO_OTHER_NAMES)


def test_a_checkpoint_under_the_name_of_another_step_is_refused_and_under_a_name_of_its_own_read(
    tmp_path: Path,
) -> None:
    place = write(tmp_path)
    other = place.rename(place.with_name("step-00000008"))
    with pytest.raises(ValueError, match=r"step-00000008/checkpoint.json is of step 7, which its directory is not"):
        read_meta(other)
    assert read_meta(other.rename(tmp_path / "favourite")).step == 7


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("step", "7", "step: Input should be a valid integer"),
        ("step", True, "step: Input should be a valid integer"),
        ("step", None, "step: Input"),
        ("config", [], "config: Input should be an object"),
        ("progress", 3, "progress: Input should be an object"),
        ("data_fingerprint", {}, "data_fingerprint: Input should be a valid string"),
        ("spec", "x", "spec: Input"),
        ("checksums", {"model.safetensors": 1}, "checksums.model.safetensors: Input"),
        ("format", [1], "has format"),
        ("version", 1, "version: Input"),
    ],
)
def test_values_of_other_types_are_named(tmp_path: Path, key: str, value: object, problem: str) -> None:
    place = write(tmp_path)
    fields = without_checksums(place) | {key: value}
    (place / "checkpoint.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=problem) as error:
        read_meta(place)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    place = write(tmp_path)
    (place / name).unlink()
    os.mkfifo(place / name)
    with pytest.raises(ValueError, match=f"{name}.*it is no file"):
        read_tensors(place, "model")


def test_the_scale_of_fp16_is_restored(tmp_path: Path) -> None:
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (64.0, 1024.0))
    place = write(tmp_path, progress={"scaler": scaler.state_dict()})
    restore(place, *trained(), NO_OTHER_NAMES, other)
    assert other.get_scale() == 64.0


def test_progress_that_the_run_cannot_use_is_said_in_a_sentence(tmp_path: Path) -> None:
    place = write(tmp_path, progress={"scaler": {"scale": 3}})
    with pytest.raises(ValueError, match=r"step-00000007/checkpoint.json has no usable progress \(KeyError"):
        restore(place, *trained(), NO_OTHER_NAMES, torch.amp.GradScaler("cpu"))


def test_the_last_good_one_stays_however_old_it_is(tmp_path: Path) -> None:
    places = {number: tmp_path / "checkpoints" / f"step-{number:08d}" for number in (3, 4, 6, 9)}
    for place in places.values():
        place.mkdir(parents=True)
    prune(tmp_path, 1, 1, 0, good=places[4])
    assert list(steps(tmp_path)) == [4, 9]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_neither_saved_nor_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    model, optimizer = trained()
    moments = checkpoint.optimizer_state(optimizer, model)
    moments["1.bias/exp_avg_sq"][0] = value
    parts = {"model": model.state_dict(), "optimizer": moments}
    with pytest.raises(
        FloatingPointError, match=r"^step 3: optimizer: 1.bias/exp_avg_sq is not finite \(1 tensors in all\)$"
    ):
        save(tmp_path, Meta("pretrain", 3, {}, ""), parts)
    assert not (tmp_path / "checkpoints").exists()
    with monkeypatch.context() as patch:  # earlier versions saved it
        patch.setattr(checkpoint, "not_finite", lambda tensors: [])
        place = save(tmp_path, Meta("pretrain", 3, {}, ""), parts)
    with pytest.raises(
        ValueError, match=r"optimizer.safetensors does not fit the run \(1.bias/exp_avg_sq is not finite"
    ):
        restore(place, *trained(), NO_OTHER_NAMES)


def test_a_model_of_other_shapes_is_not_taken_for_a_damaged_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2):
        place = save(tmp_path, Meta("pretrain", step, {}, ""), {"model": {"x": torch.zeros(2)}})
    with pytest.raises(ValueError, match="give the model that the run was trained with") as found:
        restore(place, model, optimizer, NO_OTHER_NAMES)
    assert "delete" not in str(found.value)


class DiskFullError(OSError):
    """As the system tells it."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")


@pytest.mark.parametrize("operation", ["save_file", "write_text", "sync"])
def test_a_full_disk_leaves_nothing_of_a_checkpoint_and_the_one_before_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    before = write(tmp_path, 1)

    def full(*arguments: Any, **_: object) -> None:
        if operation == "save_file":
            Path(arguments[1]).write_bytes(b"half of it")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise DiskFullError

    with monkeypatch.context() as patch:
        target = {"save_file": tensors, "write_text": Path, "sync": checkpoint}[operation]
        patch.setattr(target, operation, full)
        with pytest.raises(OSError, match="No space left on device") as error:
            write(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "checkpoints").iterdir()) == [before]
    restore(before, *trained(), NO_OTHER_NAMES)
