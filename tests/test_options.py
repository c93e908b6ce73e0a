import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fcmae import options
from fcmae.config import FinetuneConfig, PretrainConfig, SegmentConfig
from fcmae.config.base import Settings
from fcmae.config.commands import ConvertConfig, EvaluateConfig, PredictConfig, WorthConfig
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import make
from fcmae.options.files import shipped_configs
from fcmae.options.help import described, usage
from fcmae.options.line import flags
from fcmae.options.problems import ConfigError

NEEDED = ["--data.path", "photos", "--out", "run"]


def load(*flags: str) -> PretrainConfig:
    return options.load(PretrainConfig, [*NEEDED, *flags], prog="fcmae pretrain")


def problems(*flags: str, config_cls: type[Settings] = PretrainConfig, needed: Sequence[str] = NEEDED) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        options.load(config_cls, [*needed, *flags], prog="fcmae")
    return str(caught.value).splitlines()


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def test_flags_override_the_file_and_the_file_the_defaults(yaml_file: Path) -> None:
    yaml_file.write_text("epochs: 5\nmodel: {mask_ratio: 0.5, decoder_dim: 64}\n")
    config = load("--config", str(yaml_file), "--model.mask_ratio", "0.75")
    assert (config.epochs, config.model.mask_ratio, config.model.decoder_dim) == (5, 0.75, 64)
    assert config.model.mask_patch == 32


def test_an_empty_file_changes_nothing(yaml_file: Path) -> None:
    yaml_file.write_text("# nothing yet\n")
    assert load("--config", str(yaml_file)) == load()


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--data.image_size", "256"], (256, 256)),
        (["--data.image_size", "192,256"], (192, 256)),
        (["--data.image_size", "[192, 256]"], (192, 256)),
        (["--data.image_size=192", "--data.image_size=256"], (192, 256)),
        (["--data.image-size", "256"], (256, 256)),
    ],
)
def test_a_size_may_be_written_in_several_ways(flags: list[str], size: tuple[int, int]) -> None:
    assert load(*flags).data.image_size == size


def test_paths_are_taken_as_written() -> None:
    paths = ["2024", "[ab]/*.jpg", "true"]
    assert load(*[word for path in paths for word in ("--data.path", path)]).data.path == ["photos", *paths]
    assert load("--data.path", '["with, comma"]').data.path == ["photos", "with, comma"]


def evaluation(*words: str) -> EvaluateConfig:
    return options.load(EvaluateConfig, words, prog="fcmae evaluate")


def test_words_without_a_flag_are_the_arguments_as_they_are() -> None:
    config = options.load(PretrainConfig, ["a,b", "--out", "run", "none", "[c]"], prog="fcmae pretrain")
    assert config.data.path == ["a,b", "none", "[c]"]
    assert evaluation("x", "--data", "d", "y").models == evaluation("--models", "x", "y", "--data", "d").models
    convert = options.load(ConvertConfig, ["--dry_run", "src", "--source", "other", "--check"], prog="fcmae convert")
    assert (convert.source, convert.dest, convert.dry_run) == (Path("other"), Path("src"), True)


def test_a_word_that_has_no_place_is_a_problem() -> None:
    usage = "fcmae [IMAGES ...] [--config NAME] [--KEY VALUE ...]"
    assert problems("photos", "more") == [f"{word}: one argument too many; {usage}" for word in ("photos", "more")]


@pytest.mark.parametrize(
    "words",
    [["knn", "linear"], ["knn,linear"], ["[knn, linear]"], ['["knn", "linear"]'], ["knn", "--probes", "linear"]],
)
def test_a_list_may_be_written_in_several_ways(words: list[str]) -> None:
    assert evaluation("run", "--data", "d", "--probes", *words, "--num-workers", "0").probes == ["knn", "linear"]


def test_values_may_start_with_a_dash() -> None:
    assert load("--data.mean", "-.5", "0", "1e-1", "--data.std=1,1,1").data.mean == [-0.5, 0, 0.1]
    assert evaluation("run", "--data=-x", "--stages", "-2").stages == (-2,)
    assert problems("--out", "-x") == [
        "out: needs a value",
        "x: received ''; no such setting; sections: checkpoint, log, data, model, optim, monitor",
    ]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("010", "seed", 10),
        ("2024-01-01", "out", Path("2024-01-01")),
        ("0x10", "out", Path("0x10")),
    ],
)
def test_a_text_means_the_same_in_file_and_flag(yaml_file: Path, text: str, key: str, value: object) -> None:
    yaml_file.write_text(f"{key}: {text}\n")
    words = ["--data.path", "photos"] + ["--out", "run"] * (key != "out")
    for more in (["--config", str(yaml_file)], [f"--{key}", text]):
        assert getattr(options.load(PretrainConfig, [*words, *more], prog="fcmae pretrain"), key) == value


def test_the_mistakes_of_any_command_are_reported_at_once() -> None:
    assert problems(
        *["--dat", "x", "--batch-size", "0", "--probes", "knn", "lnear", "--test_share", "1"],
        *["--device", "gpu", "--stages", "4th", "--image_size", "64", "64", "64"],
        config_cls=EvaluateConfig,
        needed=[],
    ) == [
        "dat: received x; no such setting; did you mean data?",
        "image_size: received [64, 64, 64]; Tuple should have at most 2 items",
        "batch_size: received 0; allowed: >= 1",
        "device: received gpu; should be 'auto' or 'cpu'",
        "models: missing: Runs, checkpoints, exported models, names of timm models, or one of these after random: for "
        "the same network untrained. Also baselines without a network, on the same crops: pixels:32, the image "
        "averaged to 32 x 32 pixels (pixels:1 is the mean colour); histogram:8, a colour histogram with 8 bins per "
        "channel.",
        "data: missing: Labelled images: a folder with one sub-folder per class, a CSV file with the columns "
        "path,label, or shards with labels; local or by URL.",
        "test_share: received 1; allowed: > 0 and < 1",
        "probes: received [knn, lnear]; each item should be 'knn', 'linear' or 'few-shot'; did you mean linear?",
        "stages: received [4th]; '4th' is neither a number nor last: use such as 3 4, last or all",
    ]


def test_switches_need_no_value_and_may_have_one() -> None:
    config = load("--model.compile", "--model.normalize_target", "false", "--overwrite")
    assert config.model.compile and not config.model.normalize_target and config.overwrite


def test_results_are_written_on_this_machine() -> None:
    (problem,) = problems("--out", "s3://bucket/run")
    assert problem.endswith("s3://bucket/run is a URL: give a path on this machine")


def test_overwrite_is_no_setting_of_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("overwrite: yes\n")

    def complete(*_: object) -> dict[str, object]:
        raise AssertionError("nothing is to be measured")

    for chosen in (None, complete):
        with pytest.raises(ConfigError, match=r"^overwrite: it is in a file, .*: give --overwrite$"):
            options.load(PretrainConfig, [*NEEDED, "--config", "a.yaml"], prog="fcmae", complete=chosen)
    assert problems("--config", "a.yaml", "--epochs", "x") == [
        "overwrite: it is in a file, and would delete the run at every start: give --overwrite",
        "epochs: received x; should be a valid integer or should be a valid number",
    ]
    assert load("--config", "a.yaml", "--overwrite").overwrite
    needed = {"data.path": ["photos"], "out": "run"}
    with pytest.raises(ConfigError, match=r"^overwrite: it is in a file"):
        options.make(PretrainConfig, needed, "a.yaml")
    assert options.make(PretrainConfig, needed | {"overwrite": True}, "a.yaml").overwrite
    Path("a.yaml").write_text("overwrite: true\nmodels: [m]\ndata: d\n")  # of a command that deletes nothing else
    assert options.load(EvaluateConfig, ["--config", "a.yaml"], prog="x").overwrite
    with pytest.raises(SystemExit):
        load("--overwrite", "--print-config")
    printed = capsys.readouterr().out
    assert "overwrite: false" in printed
    Path("a.yaml").write_text(printed)
    assert not load("--config", "a.yaml").overwrite


def test_numbers_may_leave_out_the_zero_and_have_an_exponent(yaml_file: Path) -> None:
    yaml_file.write_text("optim: {base_lr: 1e-4}\n")  # a string in YAML 1.1
    config = load(
        "--config", str(yaml_file), "--data.mean", ".5,.4,3e-1", "--data.std", "1,1,1", "--data.crop_scale", ".2,1"
    )
    assert config.optim.base_lr == 1e-4
    assert config.data.mean == [0.5, 0.4, 0.3]


def test_none_clears_a_setting_in_flags_and_files(yaml_file: Path) -> None:
    yaml_file.write_text("data: {mean: [1, 1, 1], std: none}\nlog: {trackers: none}\n")
    config = load("--config", str(yaml_file), "--data.mean", "none")
    assert config.data.mean is None and config.data.std is None and config.log.trackers == []
    assert load("--log.trackers", "none").log.trackers == []


def test_class_weights_are_a_name_or_a_list() -> None:
    for text, value in (("balanced", "balanced"), ("1,.5", [1.0, 0.5])):
        flags = [*NEEDED, "--model.variant", "convnextv2_atto", "--regularization.class_weights", text]
        config = options.load(FinetuneConfig, flags, prog="fcmae finetune")
        assert config.regularization.class_weights == value


def test_everything_wrong_is_reported_at_once(yaml_file: Path) -> None:
    yaml_file.write_text("optim: {base_lr: fast, wd: 3}\nmodle: {mask_ratio: 1}\nlog: 3\n")
    lines = problems(
        *["--config", str(yaml_file), "--mask-ratio", ".5", "--data.hflip", "2", "--data.mean", ".5,x"],
        *["--model.variant", "tony", "--model.compile=perhaps", "--log.every_steps", "5", "--data", "photos"],
        *["--data.image_size", "200", "--out"],
        needed=["--data.path", "photos"],
    )
    expected = {
        "out": "needs a value",
        "mask-ratio": "received .5; no such setting; did you mean model.mask_ratio?",
        "data": "received photos; data holds data.image_size,",
        "modle": "received {mask_ratio: 1}; no such setting; did you mean model?",
        "log": "received 3; log holds log.every_steps,",
        "optim.wd": "received 3; no such setting; optim holds optim.base_lr,",
        "optim.base_lr": "received fast; should be a valid number",
        "data.hflip": "received 2; allowed: >= 0 and <= 1",
        "data.mean": "received [.5, x]; each item should be a valid number",
        "model.compile": "received perhaps; should be a valid boolean",
        "data.image_size": "200 is not a multiple of mask_patch 32",
    }
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines)
    variant = found.pop("model.variant")
    assert variant == (
        "received tony; should be convnextv2_tiny, or the numbers of a network such as {depths: [2, 2, 4], "
        "dims: [40, 80, 160]}"
    )
    assert found.keys() == expected.keys()
    for key, sentence in expected.items():
        assert found[key].startswith(sentence), key


def test_what_would_have_been_chosen_is_not_missing_beside_another_problem() -> None:
    def complete(*_: object) -> dict[str, object]:
        raise AssertionError("nothing is to be chosen")

    for flag, problem in (("--bogus=3", "bogus: received 3; no such setting"), ("--seed=x", "seed: received x")):
        with pytest.raises(ConfigError) as caught:
            options.load(FinetuneConfig, ["photos", flag], prog="fcmae", complete=complete)
        assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:  # what was given is looked at all the same
        options.load(
            FinetuneConfig, ["photos", "--seed=x", "--device=cpu", "--precision=fp16"], prog="fcmae", complete=complete
        )
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["seed", "precision"]
    with pytest.raises(ConfigError, match=r"^model\.key: it tells of the weights that init names: give --init$"):
        options.load(FinetuneConfig, ["photos", "--key=a"], prog="fcmae", complete=complete)
    with pytest.raises(ConfigError, match=r"^seed: received x.*\nmodel\.key: it tells"):
        options.load(FinetuneConfig, ["photos", "--key=a", "--seed=x", "--init=y"][:3], prog="fcmae")


def test_an_empty_value_has_nothing_near_it() -> None:
    assert problems("--epochs=") == ["epochs: received ''; should be a valid integer or should be a valid number"]


def test_a_wrong_value_does_not_bring_conflicts_of_the_default_in_its_place() -> None:
    # mask_patch 8 suits stem_stride 1 and not the default 4, which the wrong value leaves in force.
    assert problems("--model.stem_stride", "0", "--model.mask_patch", "8", "--data.image_size", "64") == [
        "model.stem_stride: received 0; allowed: >= 1"
    ]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--modle.mask_ratio", "1"], "modle.mask_ratio: received 1; no such setting; did you mean model.mask_ratio?"),
        (["--mask_ration=1"], "mask_ration: received 1; no such setting; did you mean model.mask_ratio?"),
        (["--lr", "1"], "lr: received 1; no such setting; did you mean optim.base_lr or optim.min_lr?"),
        (["--epoch", "1"], "epoch: received 1; no such setting; did you mean epochs?"),
        (["--zzz"], "zzz: received ''; no such setting; sections: checkpoint, log, data, model, optim, monitor"),
        (
            ["stray"],
            "stray: one argument too many; fcmae [IMAGES ...] [--config NAME] [--KEY VALUE ...]",
        ),
        (["--print-config=3"], "print_config: received 3; should be a valid boolean"),
        (["--config"], "config: needs a value"),
        (
            ["--overwrite", "perhaps"],
            "perhaps: one argument too many; fcmae [IMAGES ...] [--config NAME] [--KEY VALUE ...]",
        ),
        (["-e", "5"], "e: received 5; no such setting; sections: checkpoint, log, data, model, optim, monitor"),
        (["--data.crop_scale", ".5"], "data.crop_scale: received [.5]; needs 2 items"),
        (["--optim.betas", ".9,.9,.9"], "optim.betas: received [.9, .9, .9]; Tuple should have at most 2 items"),
        (["--data.image_size", "big"], "data.image_size: received [big]; each item should be a valid integer"),
        (["--optim.base_lr", "nan"], "optim.base_lr: received nan; should be a finite number"),
    ],
)
def test_a_problem_names_key_value_and_remedy(flags: list[str], line: str) -> None:
    assert problems(*flags) == [line]


@pytest.mark.parametrize(
    ("flags", "near"),
    [
        (["--model.variant", "convnextv2_attto"], "convnextv2_atto"),
        (["--model.variant", "convnext-tiny"], "convnext_tiny"),
        (["--model.backend", "paked"], "packed"),
        (["--model.compile", "cudagraph"], "cudagraphs"),
    ],
)
def test_a_mistyped_choice_brings_the_nearest(flags: list[str], near: str) -> None:
    (line,) = problems(*flags)
    assert line.startswith(f"{flags[0][2:]}: received {flags[1]}; ") and line.endswith(f"did you mean {near}?")


def test_a_network_is_written_alike_in_file_and_flag(yaml_file: Path) -> None:
    numbers = "{depths: [2, 2, 4], dims: [40, 80, 160], stem_stride: 2}"
    yaml_file.write_text(f"model:\n  variant: {numbers}\n")
    found = load("--model.variant", numbers)
    assert found == load("--config", str(yaml_file))
    assert (found.model.spec.dims, found.model.spec.total_stride) == ((40, 80, 160), 8)
    yaml_file.write_text(options.dump(found))
    assert options.read(PretrainConfig, yaml_file) == found
    # It replaces the file's, and is not mixed with it.
    other = load("--config", str(yaml_file), "--model.variant", "{depths: [1, 1], dims: [8, 8], kernel_size: 3}")
    assert other.model.spec == ConvNeXtSpec(depths=(1, 1), dims=(8, 8), kernel_size=3, stem_stride=2)
    assert options.diff(found, other) == [
        "model.variant: the run has {depths: [2, 2, 4], dims: [40, 80, 160]}, "
        "this command {depths: [1, 1], dims: [8, 8], kernel_size: 3}"
    ]


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ("{depths: [2, 2]}", "received {depths: [2, 2]}; dims: Field required"),
        (
            "{depths: [2, x], dims: [8, 8]}",
            "received {depths: [2, x], dims: [8, 8]}; depths: each item should be a valid",
        ),
        ("{depths: [2, 2], dims: [8]}", "received {depths: [2, 2], dims: [8]}; dims has 1 stages and depths has 2"),
        (
            "{depths: [2, 2], dims: [8, 8], width: 3}",
            "received {depths: [2, 2], dims: [8, 8], width: 3}; width: Extra inputs",
        ),
        ("{network: x}", "received {network: x}; network is 'x': use convnext or container"),
        ("{depths: [2", "received {depths: [2; should be convnextv2_atto, "),
    ],
)
def test_wrong_numbers_of_a_network_are_one_problem(numbers: str, sentence: str) -> None:
    (line,) = problems("--model.variant", numbers)
    assert line.startswith(f"model.variant: {sentence}")


def test_two_strides_of_the_stem_are_a_mistake() -> None:
    numbers = "{depths: [1, 1], dims: [8, 8], stem_stride: 2}"
    assert problems("--model.variant", numbers, "--model.stem_stride", "4") == [
        "model.stem_stride: received 4; the numbers in model.variant say 2: leave one of the two out"
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nseed: 2\n", "line 2: cannot be read as YAML: seed is given twice"),
        ("model: {mask_ratio: .5,\n  mask_ratio: .6}\n", "line 2: cannot be read as YAML: mask_ratio is given twice"),
        ("seed: [1\n", "line 2: cannot be read as YAML: expected ',' or ']'"),
        ("- seed\n", "received [seed]; a configuration is lines of `key: value`"),
        ("\xff", "received ÿ"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_its_line(yaml_file: Path, text: str, sentence: str) -> None:
    yaml_file.write_text(text, encoding="utf-8")
    unknown, wrong = problems("--config", str(yaml_file), "--zzz")
    assert unknown.startswith("zzz: ")
    assert wrong.startswith(f"{yaml_file}: {sentence}")


def test_binary_files_and_python_objects_are_refused(yaml_file: Path) -> None:
    yaml_file.write_bytes(b"\xff\x00")
    assert "cannot be read as YAML" in problems("--config", str(yaml_file))[0]
    yaml_file.write_bytes(b"seed: \x00")
    assert "special characters are not allowed" in problems("--config", str(yaml_file))[0]
    yaml_file.write_text("seed: !!python/object/apply:os.getpid []\n")
    assert "could not determine a constructor" in problems("--config", str(yaml_file))[0]


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: &a [*a]\n", " line 1: cannot be read as YAML: *a: write the value out"),
        ("model: &m {<<: *m}\n", " line 1: cannot be read as YAML: *m: write the value out"),
        (BOMB, " line 2: cannot be read as YAML: *a: write the value out"),
        ("seed: " + "[" * 50_000, " cannot be read as YAML: it is nested too deeply; give a text file"),
        ("- " * 50_000, " cannot be read as YAML: it is nested too deeply; give a text file"),
        ("{" * 50_000, " cannot be read as YAML: it is nested too deeply; give a text file"),
        ("[seed]: 1\n", " line 1: cannot be read as YAML: the name of a setting is a word"),
        ("seed: !!int x\n", " line 1: cannot be read as YAML: could not determine a constructor"),
        ("seed: !!timestamp x\n", " line 1: cannot be read as YAML: could not determine a constructor"),
        ("seed: !!bool perhaps\n", " line 1: cannot be read as YAML: could not determine a constructor"),
        ("# \n" * 100_000, " cannot be read as YAML: it has more than 262,144 bytes; give a text file"),
        ("seed: 0\n---\nseed: 1\n", " line 2: cannot be read as YAML: but found another document"),
    ],
)
def test_a_hostile_file_is_one_sentence(yaml_file: Path, text: str, sentence: str) -> None:
    yaml_file.write_text(text)
    for read in (lambda: load("--config", str(yaml_file)), lambda: options.read(PretrainConfig, yaml_file)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value).startswith(f"{yaml_file}:{sentence}") and "\n" not in str(caught.value)


def test_a_configuration_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, why in (
        (tmp_path, "it is no file"),
        (tmp_path / "pipe.yaml", "it is no file"),
        (tmp_path / "x", "No such"),
    ):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read as YAML: {why}"):
            options.read(PretrainConfig, path)


def test_a_flag_that_is_nested_too_deeply_is_a_wrong_value() -> None:
    (line,) = problems("--data.image_size", "[" * 5000)
    assert line.startswith("data.image_size: received [[[[")


VALUES: st.SearchStrategy[object] = st.recursive(
    st.sampled_from(["none", "", "x", "1", "-1", "nan", "1e999", "9" * 4400, "true", "ü\U0001f600", "a.b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["depths", "dims", "x", ""]), inner),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([*PretrainConfig.model_fields, "x"]), VALUES | st.dictionaries(
    st.sampled_from(["variant", "image_size", "mean", "path", "val_share", "labelled", "base_lr", ""]), VALUES,
    max_size=1,
), max_size=2))  # fmt: skip
def test_values_of_any_type_give_settings_or_sentences(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(content))
    with suppress(ConfigError):
        options.load(PretrainConfig, [*NEEDED, "--config", str(path)], prog="fcmae")


def test_a_dotted_key_in_a_file_is_shown_its_section(yaml_file: Path) -> None:
    yaml_file.write_text("model.mask_ratio: 0.5\n1: 2\n")
    assert problems("--config", str(yaml_file)) == [
        "model.mask_ratio: received 0.5; in a file write `mask_ratio:` in the section `model:`",
        "1: received 2; no such setting; sections: checkpoint, log, data, model, optim, monitor",
    ]


def test_an_unknown_configuration_lists_the_shipped_ones() -> None:
    (line,) = problems("--config", "pretrain_ato.yaml")
    assert "pretrain_ato.yaml; no such file, nor one of finetune_atto, " in line
    assert line.endswith("did you mean pretrain_atto?")


def test_print_config_prints_what_the_run_would_use(capsys: pytest.CaptureFixture[str], yaml_file: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("--print-config", "--model.mask_ratio", "0.75")
    assert not stopped.value.code
    yaml_file.write_text(capsys.readouterr().out)
    assert options.read(PretrainConfig, yaml_file) == load("--model.mask_ratio", "0.75")


def test_print_config_reports_problems_as_a_run_does() -> None:
    assert problems("--print-config", needed=["--out", "run"]) == [
        "data.path: missing: a folder of images, e.g. --data.path photos"
    ]


def test_settings_are_described_as_the_help_shows_them() -> None:
    rows = {row.key: row for row in described(PretrainConfig)}
    shown = " ".join(usage(PretrainConfig, "fcmae pretrain").split())
    assert set(rows) == set(options.flat(load())) - {"chosen", "planned_s"}
    assert rows["data.image_size"][1:3] == ("N,N", "224,224")
    assert rows["hours"].default == ""
    for row in rows.values():
        assert f"{row.description} [{row.default}]" in shown if row.default else row.description in shown


def test_help_shows_every_setting_once_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("--help")
    shown = capsys.readouterr().out
    assert not stopped.value.code
    for flag in ("--config", "--print-config", "--out", "--data.path", "--model.mask_ratio", "--optim.betas"):
        assert shown.count(f"  {flag} ") == 1
    assert "[0.9,0.95]" in shown and "Share of the patches that is hidden. [0.6]" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (PretrainConfig, [""]),
        (PretrainConfig, ["photos", "--out", ""]),
        (FinetuneConfig, ["labelled", "--data.val_path", ""]),
        (PredictConfig, ["model", ""]),
        (WorthConfig, [""]),
    ],
)
def test_an_empty_path_is_not_this_folder(model: Any, words: list[str]) -> None:
    """As of a shell's variable that is not set."""
    with pytest.raises(ConfigError, match="it is empty: give a path"):
        options.load(model, words, prog="x")


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        (SegmentConfig, ["pairs.csv", "--maps", "maps"], "pairs.csv names the maps itself: leave one out"),
        (EvaluateConfig, ["run", "--data", "labelled", "--labels", "5%"], "it is for few-shot: give --probes"),
    ],
)
def test_what_would_be_left_is_refused(model: Any, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        options.load(model, words, prog="x")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: not text.startswith("~"))
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(
    paths=st.lists(texts.filter(bool), min_size=1),
    ratio=shares.filter(lambda share: share < 0.8),
    mean=st.none() | st.lists(st.floats(-9, 9), min_size=3, max_size=3),
    rate=st.floats(1e-12, 1e3),
    name=texts,
)
def test_dumped_settings_load_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    paths: list[str],
    ratio: float,
    mean: list[float] | None,
    rate: float,
    name: str,
) -> None:
    config = PretrainConfig.model_validate(
        {
            "out": Path("runs") / f"run {name}",
            "data": {"path": paths, "mean": mean, "std": mean and [1.0] * 3, "image_size": [64, 96]},
            "model": {"mask_ratio": ratio},
            "optim": {"base_lr": rate},
        }
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(options.dump(config), encoding="utf-8")
    assert options.read(PretrainConfig, file) == config
    words = flags(options.changed(config))
    assert options.load(PretrainConfig, words, prog="fcmae pretrain") == config


def test_a_saved_run_is_read_whatever_this_machine_has(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("--batch_size", "6", "--model.backend", "minkowski")
    yaml_file.write_text(options.dump(config))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    assert options.read(PretrainConfig, yaml_file) == config
    with pytest.raises(
        ConfigError, match=r"^batch_size: 6 is not .* = 4 x 1: the nearest is 8\nmodel.backend: minkowski"
    ):
        options.load(PretrainConfig, ["--config", str(yaml_file)], prog="fcmae pretrain", num_processes=4)
    with pytest.raises(ConfigError, match=r"mine\.yaml: regularization"):
        yaml_file.write_text("regularization: {mixup: 1}")
        options.read(PretrainConfig, yaml_file)


def test_differences_name_what_changes_the_result_and_nothing_else() -> None:
    saved = load()
    moved = load("--out", "other", "--data.path", "elsewhere", "--model.backend", "masked", "--log.every_steps", "1")
    assert options.diff(saved, moved) == []
    changed = load(
        "--model.mask_ratio", "0.75", "--data.image_size", "192,256", "--data.mean", "0,0,0", "--data.std", "1,1,1"
    )
    assert options.diff(saved, changed) == [
        "data.image_size: the run has [224, 224], this command [192, 256]",
        "data.mean: the run has none, this command [0.0, 0.0, 0.0]",
        "data.std: the run has none, this command [1.0, 1.0, 1.0]",
        "model.mask_ratio: the run has 0.6, this command 0.75",
    ]


SHIPPED = shipped_configs()
# base lr, weight decay, layer decay, mode, warm-up, epochs, label smoothing, mixup, cutmix, drop path
PUBLISHED = {
    "atto": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0, 0, 0.1),
    "femto": (2e-4, 0.05, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0),
    "pico": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0),
    "nano": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.5, 0.5, 0.1),
    "tiny": (8e-4, 0.05, 0.9, "single", 40, 300, 0.1, 0.8, 1.0, 0.2),
    "base": (6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1.0, 0.1),
    "large": (6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1.0, 0.2),
    "huge": (1.25e-3, 0.05, 0.75, "group", 10, 50, 0.1, 0.8, 1.0, 0.3),
}


def test_what_was_planned_for_other_settings_is_not_told_of_these(tmp_path: Path) -> None:
    cfg = make(PretrainConfig, {"data.path": ["a"], "out": "b", "epochs": 100, "batch_size": 8})
    cfg = cfg.model_copy(update={"planned_s": 7200.0, "chosen": {"epochs": "two hours", "batch_size": "fits"}})
    (tmp_path / "a.yaml").write_text(options.dump(cfg))
    words = ["--config", str(tmp_path / "a.yaml")]
    same = options.load(PretrainConfig, [*words, "--out", "c"], prog="x")
    assert (same.planned_s, same.chosen) == (cfg.planned_s, cfg.chosen)
    other = options.load(PretrainConfig, [*words, "--epochs", "5"], prog="x")
    assert (other.planned_s, other.chosen) == (None, {"batch_size": "fits"})


def test_a_name_of_a_run_that_is_gone_and_a_slash_make_no_other_run() -> None:
    def of(init: str, path: str) -> FinetuneConfig:
        return make(FinetuneConfig, {"data.path": path, "out": "b", "model.init": init})

    assert of("photos", "a/").data.path == "a" and of("photos/", "/").data.path == "/"
    assert of("photos", "s3://b/").data.path == "s3://b/"
    assert not options.diff(of("runs/photos", "a"), of("photos", "a")) and options.diff(
        of("runs/photos", "a"), of("runs/b", "a")
    )


def test_a_run_of_an_earlier_version_is_resumed_with_the_same_settings(yaml_file: Path) -> None:
    yaml_file.write_text(
        "# fcmae pretrain 0.1.0\nout: run\ndevice: auto\ndata:\n  path: [photos]\n  mean: null\n"
        "model:\n  variant: convnextv2_atto\n  freeze_encoder_steps: 0\n  stem_stride: 4\n  compile: false\n"
        "optim:\n  base_lr: 0.00015\n  betas: [0.9, 0.95]\n"
    )
    assert options.diff(options.read(PretrainConfig, yaml_file), load("--model.variant", "atto")) == []


def test_a_setting_is_changed_if_leaving_it_out_gives_another() -> None:
    assert options.changed(load()) == {"out": "run", "data.path": ["photos"]}
    assert options.changed(load("--model.stem_stride", "2", "--model.mask_patch", "16", "--seed", "0")) == {
        "out": "run",
        "data.path": ["photos"],
        "model.stem_stride": 2,
        "model.mask_patch": 16,
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_loads_with_images_and_out_alone(name: str) -> None:
    config_cls = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "segment": SegmentConfig}[
        name.partition("_")[0]
    ]
    needed = [*NEEDED, "--data.maps", "maps"] if config_cls is SegmentConfig else NEEDED
    by_name = options.load(config_cls, ["--config", name, *needed], prog="fcmae")
    assert by_name == options.load(config_cls, ["--config", str(SHIPPED[name]), *needed], prog="fcmae")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_is_headed_by_what_to_expect(name: str) -> None:
    kind = name.partition("_")[0]
    modeline, *head = SHIPPED[name].read_text(encoding="utf-8").splitlines()
    assert modeline == f"# yaml-language-server: $schema=schema/{kind}.json"
    comments = [line for line in head if line.startswith("#")]
    assert head[0].startswith("# ") and len(head[0]) < 100
    for label in ("# Command:", "# Hardware:", "# Expected time:", "# Expected result:"):
        assert sum(line.startswith(label) for line in comments) == 1, label


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_fine_tuning_numbers_are_in_force(variant: str) -> None:
    flags = ["--config", f"finetune_{variant}", *NEEDED]
    cfg = options.load(FinetuneConfig, flags, prog="fcmae finetune")
    optim, reg = cfg.optim, cfg.regularization
    assert PUBLISHED[variant] == (
        *(optim.base_lr, optim.weight_decay, optim.layer_decay, optim.layer_decay_mode, optim.warmup_epochs),
        *(cfg.epochs, reg.label_smoothing, reg.mixup, reg.cutmix, cfg.model.drop_path_rate),
    )
    assert (cfg.model.variant, cfg.batch_size, reg.ema_decay) == (f"convnextv2_{variant}", 1024, 0.9999)
    assert (cfg.data.auto_augment, cfg.data.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert cfg.model.head_init_scale is None  # .001 with weights to start from, 1 without


@pytest.mark.parametrize("variant", ["atto", "tiny", "base"])
def test_published_pretraining_is_the_default_of_every_setting_but_the_variant(variant: str) -> None:
    flags = [*NEEDED, "--checkpoint.every_epochs", "5", "--model.variant", f"convnextv2_{variant}"]
    default = options.load(PretrainConfig, flags, prog="fcmae")
    assert load("--config", f"pretrain_{variant}") == default


def test_small_images_keep_a_grid_of_eight_by_eight() -> None:
    config = load("--config", "pretrain_small_images")
    assert min(config.data.image_size) // config.model.mask_patch == 8


# From Python


def test_a_mapping_goes_before_the_file_key_by_key(yaml_file: Path) -> None:
    yaml_file.write_text("seed: 1\ndata: {path: [photos], hflip: 0.1}\nout: runs/a\n")
    settings = {"seed": 2, "data": {"image_size": 64}, "model.variant": {"depths": [1, 1], "dims": [8, 8]}}
    cfg = make(PretrainConfig, settings | {"data.val_share": 0.5}, str(yaml_file))
    assert (cfg.seed, cfg.data.path, cfg.data.hflip, cfg.data.val_share) == (2, ["photos"], 0.1, 0.5)
    assert (cfg.data.image_size, cfg.model.spec.dims) == ((64, 64), (8, 8))


def test_a_mapping_may_hold_a_setting_once() -> None:
    with pytest.raises(ConfigError, match=r"^data.hflip: given twice: leave one out$"):
        make(PretrainConfig, {"data.hflip": 0.1, "data": {"hflip": 0.1}})


def test_mistakes_in_a_mapping_are_told_as_those_of_a_file() -> None:
    with pytest.raises(ConfigError) as error:
        make(PretrainConfig, {"out": "x", "data": {"path": ["p"], "image_sise": 3}, "epochs": 0, "model": 5})
    first, second, third = sorted(str(error.value).splitlines())
    assert first == "data.image_sise: received 3; no such setting; did you mean data.image_size?"
    assert second == "epochs: received 0; allowed: > 0"
    assert third.startswith("model: received 5; model holds model.variant, ")
