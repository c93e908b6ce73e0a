"""Scripts of shells, run by the shells that are here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fcmae.cli import COMMANDS
from fcmae.completion import script
from fcmae.config import CheckpointConfig

SETTINGS = {name: settings for name, (settings, _) in COMMANDS.items()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pre"], {"pretrain", "predict"}),
        (["pretrain", "--device", ""], {"auto", "cpu"}),
        (["pretrain", "--overwrite", "t"], {"true"}),
        (["finetune", "--model.hea"], {"--model.head_init_scale"}),
        (["convert", "--to", "ti"], {"timm"}),
        (["pretrain", "--config", "pretrain_cp"], {"pretrain_cpu"}),
        (["pretrain", "--chos"], set()),
        (["pretrain", "--overwrite", "--chec"], {f"--checkpoint.{name}" for name in CheckpointConfig.model_fields}),
    ],
)
def test_bash_completes_commands_flags_and_values(words: list[str], expected: set[str], tmp_path: Path) -> None:
    assert completed(words, tmp_path) == expected


def completed(words: list[str], place: Path) -> set[str]:
    """What bash offers for the last of the words, in a folder."""
    line = " ".join(f"'{word}'" for word in ("fcmae", *words))
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _fcmae; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    command = ["bash", "-c", script("bash", SETTINGS) + ask]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place)
    return set(done.stdout.splitlines()) - {""}


def test_files_are_completed_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "my photos").mkdir()
    for words in (["pretrain", "my"], ["predict", "--probabilities", "my"], ["pretrain", "--config", "my"]):
        assert completed(words, tmp_path) == {"my photos"}


def test_zsh_takes_the_script_of_bash_and_fish_has_a_line_a_flag() -> None:
    assert script("zsh", SETTINGS).endswith(script("bash", SETTINGS))
    lines = script("fish", SETTINGS).splitlines()
    assert "complete -c fcmae -n '__fish_seen_subcommand_from pretrain' -l overwrite" in lines
    assert "complete -c fcmae -n '__fish_seen_subcommand_from pretrain' -l device -x -a 'auto cpu'" in lines


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_that_is_here_can_read_its_script(shell: str) -> None:
    needs(shell)
    subprocess.run([shell, "-n"], input=script(shell, SETTINGS), text=True, check=True)


def needs(shell: str) -> None:
    """Skip the test where the shell is not there, and need not be: FCMAE_REQUIRE_SHELLS=1, as in CI."""
    if shutil.which(shell) is None and not os.environ.get("FCMAE_REQUIRE_SHELLS"):
        pytest.skip(f"there is no {shell}")


@pytest.mark.parametrize(("line", "found"), [("fcmae pretr", "pretrain"), ("fcmae pretrain --devi", "--device")])
def test_fish_completes_commands_and_flags(tmp_path: Path, line: str, found: str) -> None:
    needs("fish")
    (tmp_path / "fcmae.fish").write_text(script("fish", SETTINGS))
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {tmp_path}/fcmae.fish; complete -C '{line}'"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert found in [each.split("\t")[0] for each in done.stdout.splitlines()]
