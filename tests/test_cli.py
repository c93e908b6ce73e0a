import errno
import importlib
import io
import json
import shlex
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import write_images

import fcmae
from fcmae.cli import COMMANDS, main
from fcmae.config import FinetuneConfig, PretrainConfig, RunConfig
from fcmae.config.commands import AnalyzeConfig, PredictConfig
from fcmae.data.index import Images
from fcmae.options import load
from fcmae.options.problems import ConfigError
from fcmae.training.run import Run

ROOT = Path(__file__).parent.parent


class Recorder(ModuleType):
    """Stands in for a module of fcmae: notes the calls of one function and answers them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, function: str, result: object = None) -> None:
        super().__init__(f"fcmae.{name}")
        self.calls: list[Any] = []
        self.result = result
        setattr(self, function, self._call)
        for real in (name, "evaluation.status"):  # with what they import, none of which must see the stand-in
            importlib.import_module(f"fcmae.{real}")
        monkeypatch.setitem(sys.modules, f"fcmae.{name}", self)
        parent, _, leaf = f"fcmae.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), leaf, self, raising=False)

    def _call(self, *args: object, **options: object) -> object:
        self.calls.append((*args, options) if options else args)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_pretrain_and_finetune_get_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = Recorder(monkeypatch, "pretraining", "pretrain", Run(Path("run"), "pretrain"))
    finetune = Recorder(monkeypatch, "finetuning", "finetune", Run(Path("run"), "finetune"))
    monkeypatch.setattr("fcmae.planning._free_memory", lambda device: 1 << 40)  # nothing needs to be measured
    assert main(["pretrain", "--config", "pretrain_cpu", "--data.path", "photos", "--out", "run", "--epochs", "3"]) == 0
    assert main(["finetune", "--config", "finetune_atto", "--data.path", "labelled", "--out", "run"]) == 0
    (pretrain_config,), (finetune_config,) = pretrain.calls[0], finetune.calls[0]
    assert isinstance(pretrain_config, PretrainConfig) and pretrain_config.epochs == 3
    assert isinstance(finetune_config, FinetuneConfig) and finetune_config.epochs == 600


def test_settings_that_cannot_be_used_print_a_line_each_and_give_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--model.mask_ration", "2", "--out", "run"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "fcmae: error: model.mask_ration: received 2; no such setting; did you mean model.mask_ratio?",
        "fcmae: error: data.path: missing: a folder of images, e.g. --data.path photos",
    ]


@pytest.mark.parametrize("error", [ValueError("no image in photos"), FileNotFoundError("no image in photos")])
def test_errors_a_user_can_mend_show_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    Recorder(monkeypatch, "weights.convert", "convert", error)
    assert main(["convert", "run", "out"]) == 2
    assert capsys.readouterr().err == "fcmae: error: no image in photos\n"
    for words in (
        "--debug convert run out",
        "--debug=true convert run out",
        "convert --debug run out",
        "convert run out --debug true",
    ):
        with pytest.raises(type(error), match="no image in photos"):
            main(words.split())


def test_a_signal_to_a_command_that_does_not_train_leaves_nothing_temporary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(*_: object) -> None:
        with TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fcmae.weights.convert.convert", convert)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "run", "out"])
    assert ended.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Recorder(monkeypatch, "weights.convert", "convert", OSError(errno.ENOSPC, "No space left on device", "out"))
    assert main(["convert", "run", "out"]) == 2
    sentence = "out: No space left on device; free some space there, or choose another place"
    assert capsys.readouterr().err == f"fcmae: error: {sentence}\n"


def test_a_reader_that_has_enough_ends_a_command_in_silence() -> None:
    command = f"{sys.executable} -m fcmae.cli configs | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, "weights.convert", "convert", BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert main(["convert", "run", "out"]) == 2


def test_names_that_are_no_unicode_are_printed_with_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8"))
    Recorder(monkeypatch, "evaluation.embed", "embed", "wrote caf\udce9")
    assert main(["embed", "run", "--images", "x", "--out", "y"]) == 0
    assert printed.getvalue() == b"wrote caf\\udce9\n"


def test_a_bug_is_not_taken_for_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, "weights.convert", "convert", KeyError("stem"))
    with pytest.raises(KeyError):
        main(["convert", "run", "out"])


def test_convert_prints_what_it_did(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    convert = Recorder(monkeypatch, "weights.convert", "convert", "wrote out")
    assert main(["convert", "run", "out"]) == main(["convert", "run", "out", "--to", "fair"]) == 0
    which = ["--variant", "atto", "--key", "model_ema", "--prefix", "student"]
    assert main(["convert", "run", "--dry-run", *which]) == 0
    assert convert.calls == [
        (Path("run"), Path("out"), "timm", None, None, None),
        (Path("run"), Path("out"), "fair", None, None, None),
        (Path("run"), None, "timm", "convnextv2_atto", "model_ema", "student"),
    ]
    assert capsys.readouterr().out == "wrote out\n" * 3
    assert main(["convert", "run"]) == 2
    assert "DEST is missing: name a new path" in capsys.readouterr().err
    check = Recorder(monkeypatch, "weights.convert", "check", "as expected")
    assert main(["convert", "--check", "run"]) == 0
    assert check.calls == [(Path("run"), None, None, None)]


def test_predict_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Recorder(monkeypatch, "prediction", "predict")
    assert main(["predict", "run", "a.png", "b.png", "--csv", "out.csv", "--batch-size", "2"]) == 0
    assert predict.calls == [
        (PredictConfig(model=Path("run"), images=["a.png", "b.png"], csv=Path("out.csv"), batch_size=2),)
    ]


def test_analyze_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    analyze = Recorder(monkeypatch, "evaluation.analyze", "analyze", "a table")
    assert main(["analyze", "a", "b", "--images", "x", "y", "--image-size", "64"]) == 0
    assert main(["analyze", "a", "--data", "d", "--out", "o", "--image-size", "64", "96", "--overwrite"]) == 0
    assert analyze.calls == [
        (AnalyzeConfig(models=["a", "b"], images=["x", "y"], image_size=(64, 64)),),
        (AnalyzeConfig(models=["a"], data="d", out=Path("o"), image_size=(64, 96), overwrite=True),),
    ]
    assert capsys.readouterr().out == "a table\n" * 2
    for words in (["a"], ["a", "--images", "x", "--data", "d"]):
        assert main(["analyze", *words]) == 2
        assert "images: give either images or data" in capsys.readouterr().err


def test_stats_prints_lines_for_a_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    index = replace(Images.of_files(["/x.png"]), notes=("1 .gif was left out",))
    pretrain = Recorder(monkeypatch, "pretraining", "pretrain", Run(Path("run"), "pretrain"))
    measured = list[Any]()

    def statistics(*args: Any, **options: Any) -> Any:
        measured.append((*args, options))
        return [0.123456, 0.5], [1e-5, 0.25], 7

    monkeypatch.setattr("fcmae.data.survey.find_images", lambda *_, **__: index)
    monkeypatch.setattr("fcmae.data.survey.channel_statistics", statistics)
    assert main(["stats", "a", "b", "--in-chans", "2", "--max-images", "9", "--num-workers", "1"]) == 0
    given = {"max_images": 9, "num_workers": 1, "max_pixels": 100_000_000, "nodata": None, "key": "path", "tells": True}
    assert measured == [(index, 2, given)]
    config, shown = tmp_path / "stats.yaml", capsys.readouterr()
    assert shown.err == "1 .gif was left out\n" and "nodata" not in shown.out
    assert main(["stats", "a", "b", "--in-chans", "2", "--nodata", "-3.4e38"]) == 0
    config.write_text(capsys.readouterr().out)
    assert config.read_text().startswith("# 7 images\n")
    monkeypatch.setattr("fcmae.planning.complete", lambda sketch, given: {"grad_accum": 1})  # as it is no recipe
    assert main(["pretrain", "--config", str(config), "--data.path", "a", "--out", "run"]) == 0
    data = pretrain.calls[0][0].data
    assert (data.in_chans, data.mean, data.std, data.nodata) == (2, [0.123456, 0.5], [1e-5, 0.25], -3.4e38)


def test_memory_of_a_gpu_that_does_not_suffice_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(cfg: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr("fcmae.prediction.predict", predict)
    assert main(["predict", "model", "photos"]) == 2
    said = "CUDA out of memory. Tried to allocate 2.00 GiB: lower --batch_size, or give --device cpu"
    assert capsys.readouterr().err == f"fcmae: error: {said}\n"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_stats_are_of_the_channels_that_the_images_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: int
) -> None:
    for i in range(2):
        values = np.full((5, 4, channels), 102 * i, np.uint8)
        if channels == 4:
            np.save(tmp_path / f"{i}.npy", values)
        else:
            Image.fromarray(values.squeeze()).save(tmp_path / f"{i}.png")
    assert main(["stats", str(tmp_path), "--num-workers", "0"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)["data"]
    assert found == {"in_chans": channels, "mean": [0.2] * channels, "std": [0.2] * channels}


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_counts_are_positive(capsys: pytest.CaptureFixture[str], count: str) -> None:
    assert main(["stats", "a", f"--in-chans={count}"]) == 2
    assert f"in_chans: received {count}; " in capsys.readouterr().err


def test_configs_lists_every_shipped_file_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert any(line.startswith("pretrain_cpu ") and "laptop" in line for line in lines)


def test_every_command_has_a_schema_and_a_mistyped_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main(["schema", name]) == 0
        assert json.loads(capsys.readouterr().out)["type"] == "object"
    assert main(["schema", "pretrian"]) == 2
    assert "pretrian: no such command; did you mean pretrain?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(["finetune", "photos", "--init", "photso"], ["convert", "photso", "dest"], ["status", "photso"]),
        *(["report", "photso"], ["evaluate", "photso", "--data", "photos"]),
        ["evaluate", "photso", "--data", "photos", "--out", "out"],
    ],
)
def test_a_mistyped_run_is_told_with_those_of_nearly_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_images(tmp_path / "photos" / name, 4)
    Path("runs/photos").mkdir(parents=True)
    Path("runs/photos/config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    assert main(words) == 2
    assert "did you mean runs/photos?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["finetune", "labelled", "--init", "photos"], "model.init"),
        (["evaluate", "photos", "--data", "x"], "models"),
        (["convert", "photos", "dest"], "source"),
    ],
)
def test_a_run_is_named_without_the_folder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()  # of images
    Path("runs/photos").mkdir(parents=True)
    Path("runs/photos/config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    settings, _ = COMMANDS[words[0]]
    found = attrgetter(key)(
        load(settings, [*words[1:], "--out", "out"] if words[0] != "convert" else words[1:], prog="x")
    )
    assert str(found[0] if isinstance(found, list) else found) == str(Path("runs/photos"))


@pytest.mark.parametrize("command", ["pretrain", "finetune", "segment"])
def test_the_schema_that_editors_read_is_that_of_the_settings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", command]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "configs" / "schema" / f"{command}.json").read_text() == printed
    schema = json.loads(printed)
    assert {"out", "data", "model", "optim", "epochs"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fcmae {fcmae.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_example_that_can_be_used(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: fcmae {command} ") and max(map(len, shown.splitlines())) <= 120
    settings, _ = COMMANDS[command]
    example = shlex.split(shown.partition("Example: ")[2].splitlines()[0])
    assert example[:2] == ["fcmae", command]
    # Where it is left out, the directory is chosen.
    load(settings, [*example[2:], *(["--out", "run"] if issubclass(settings, RunConfig) else [])], prog="test")


NEED_NOTHING = ("bench", "status", "roadmap", "doctor", "verify", "configs", "schema", "completion")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_all_that_is_wrong_with_an_empty_line(command: str) -> None:
    settings, _ = COMMANDS[command]
    if command in NEED_NOTHING:
        load(settings, [], prog="test")
        return
    with pytest.raises(ConfigError) as raised:
        load(settings, [], prog="test")
    assert all("missing" in line or "give either" in line for line in str(raised.value).splitlines())


def test_the_commands_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == status
        shown = capsys.readouterr().out
        for name, (settings, _) in COMMANDS.items():
            assert f"\n  {name:11} {(settings.__doc__ or '').splitlines()[0]}\n" in shown


def test_a_mistyped_command_brings_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian", "photos"]) == main(["zzz"]) == 2
    near, none = capsys.readouterr().err.splitlines()
    assert near == "fcmae: error: pretrian: no such command; did you mean pretrain?"
    assert none.startswith("fcmae: error: zzz: no such command; there are: pretrain, finetune, ")


def test_a_commands_own_status_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, status in ((True, 0), (False, 1)):
        doctor = Recorder(monkeypatch, "doctor", "doctor", found)
        assert main(["doctor", "--quick", "--json", "--out", "x"]) == status
        assert doctor.calls == [(Path("x"), True, True)]


@pytest.mark.parametrize(
    ("number", "finished", "status"),
    [("SIGTERM", False, 143), ("SIGINT", False, 130), ("SIGUSR1", False, 0), ("SIGTERM", True, 0), (None, True, 0)],
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_status_of_a_run_tells_whether_a_signal_stopped_it(
    monkeypatch: pytest.MonkeyPatch, command: str, number: str | None, finished: bool, status: int
) -> None:
    run = Run(Path("run"), command, finished, number)
    Recorder(monkeypatch, {"pretrain": "pretraining", "finetune": "finetuning"}[command], command, run)
    assert main([command, "images", "--config", f"{command}_cpu", "--out", "run", "--model.variant", "atto"]) == status


def test_processes_are_counted_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = Recorder(monkeypatch, "pretraining", "pretrain", Run(Path("run"), "pretrain"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["pretrain", "photos", "--config", "pretrain_cpu", "--out", "run", "--batch_size", "4"]) == 2
    assert "4 is not a multiple of processes x grad_accum = 3 x 1: the nearest is 3" in capsys.readouterr().err
    assert not pretrain.calls


def test_commands_of_one_process_are_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["predict", "runs/a", "photos", "--csv", "a.csv"]) == 2
    assert (
        capsys.readouterr().err
        == "fcmae: error: predict is one process, and WORLD_SIZE = 3: start it without a launcher\n"
    )


def test_help_and_rejected_settings_do_not_wait_for_torch() -> None:
    words = (
        *("--help", "pretrain --help", "bench --help", "evaluate --help", "verify --help", "convert --help"),
        *("finetune", "configs", "pretrain --config nowhere", "evaluate", "predict --nothing", "pretrian"),
    )
    code = (
        f"import sys; from fcmae.cli import main\nfor words in {words!r}:\n"
        "    try: main(words.split())\n    except SystemExit: pass\n"
        "    assert not {'torch', 'timm', 'accelerate'} & sys.modules.keys(), words"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "segment.py"])
def test_the_scripts_in_a_clone_are_the_commands(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--zzz"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("fcmae: error: zzz: ")


def test_a_wheel_brings_the_configurations_and_the_parts_of_the_report(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = "import fcmae, fcmae.options.files as s; print(fcmae.__file__, *s.shipped_configs(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=installed, check=True)
    package, *names = done.stdout.splitlines()
    assert Path(package).is_relative_to(installed)
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert {"report.html.j2", "report.css", "report.js"} <= {path.name for path in installed.glob("fcmae/evaluation/*")}
