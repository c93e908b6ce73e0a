"""Scripts by which a shell completes a command line of ours: `fcmae completion bash`, zsh or fish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fcmae.config.base import Settings
from fcmae.options.help import words_of

_BASH = """\
_fcmae() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then COMPREPLY=($(compgen -W "{commands}" -- "$current")); return; fi
  case "$command $before" in
{values}
  esac
  case "$command $current" in
{flags}
  esac
  local IFS=$'\n'  # names may have spaces
  COMPREPLY=($(compgen -f -- "$current"))
}}
complete -o filenames -F _fcmae fcmae
"""


def script(shell: str, commands: Mapping[str, type[Settings]]) -> str:
    """A script that a shell reads when it starts.

    Args:
        shell: bash, zsh or fish.
        commands: their settings by name.
    """
    flags = {name: words_of(settings) for name, settings in commands.items()}
    if shell == "fish":
        return "\n".join(_fish(flags)) + "\n"
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    values = [
        _case(f"{command} {flag}", words, end="(( ${#COMPREPLY[@]} )) && return")
        for command, found in flags.items()
        for flag, words in found.items()
        if words
    ]
    names = [_case(f"{command} -", found, "*") for command, found in flags.items()]
    return head + _BASH.format(commands=" ".join(flags), values="\n".join(values), flags="\n".join(names))


def _case(start: str, words: Iterable[str], more: str = "", end: str = "return") -> str:
    return f'    "{start}"{more}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current")); {end} ;;'


def _fish(flags: Mapping[str, Mapping[str, list[str]]]) -> Iterable[str]:
    yield f"complete -c fcmae -n __fish_use_subcommand -a '{' '.join(flags)}'"
    for command, found in flags.items():
        for flag, words in found.items():
            values = f" -x -a '{' '.join(words)}'" if words else " -r"
            if words == ["true", "false"]:  # a switch, which needs no value
                values = ""
            elif flag == "--config":  # a file, or one of these
                values = values.replace("-x", "-r")
            yield f"complete -c fcmae -n '__fish_seen_subcommand_from {command}' -l {flag.removeprefix('--')}{values}"
