"""``wsiflow completion``: a script with which a shell completes commands, options, keys, their values, and files."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from ..terminal import say

# Bash splits words at "=", so that what stands behind it is completed by itself; zsh is told to do so. A key gets no
# blank behind it, and where nothing fits, files do.
_BASH = """\
_wsiflow() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}" word command candidates
  word="${{line##* }}"
  read -r _ command _ <<< "$line "
  if [[ "$line" != *" $command "* ]]; then command=""; fi
  case "$command" in
{cases}
    *) candidates="{commands}" ;;
  esac
  if [[ "$word" == *=* ]]; then
    case "${{word%%=*}}" in
{values}
      *) candidates="" ;;
    esac
    word="${{word#*=}}"
  fi
  COMPREPLY=($(compgen -W "$candidates" -- "$word"))
  if [[ ${{#COMPREPLY[@]}} -eq 0 ]]; then
    COMPREPLY=($(compgen -f -- "$word"))
    compopt -o filenames
  elif [[ "${{COMPREPLY[*]}}" == *= ]]; then
    compopt -o nospace
  fi
}}
complete -F _wsiflow wsiflow
"""
_ZSH = """\
#compdef wsiflow
_wsiflow() {{
  local command="$words[2]" candidates
  if (( CURRENT == 2 )); then command=""; fi
  case "$command" in
{cases}
    *) candidates="{commands}" ;;
  esac
  if [[ "$PREFIX" == *=* ]]; then
    case "${{PREFIX%%=*}}" in
{values}
      *) candidates="" ;;
    esac
    compset -P 1 "*="
  fi
  local -a keys=(${{(M)${{=candidates}}:#*=}}) others=(${{${{=candidates}}:#*=}})
  compadd -S "" -a keys
  compadd -a others || (( compstate[nmatches] )) || _files
}}
compdef _wsiflow wsiflow
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}
_HYDRA = {"hydra/launcher": "basic joblib submitit_local submitit_slurm", "hydra/sweeper": "basic optuna"}
_OVERRIDABLE = {"run", "plan"}


def add_options(parser: ArgumentParser) -> None:
    """Add the name of the shell."""
    parser.description = (
        "Print a script for a shell. bash: wsiflow completion bash > "
        "~/.local/share/bash-completion/completions/wsiflow. zsh: wsiflow completion zsh > ~/.wsiflow.zsh, and "
        "'source ~/.wsiflow.zsh' behind compinit in ~/.zshrc. Do so again after an update."
    )
    parser.add_argument("shell", choices=sorted(_SCRIPTS))


def main(arguments: Namespace) -> int:
    """Print the script of a shell."""
    say(_script(arguments.shell))
    return 0


def _script(shell: str) -> str:
    from . import COMMANDS

    cases = [f'    {name}) candidates="{" ".join(_words(name))}" ;;' for name in COMMANDS]
    values = [f'      {key}) candidates="{words}" ;;' for key, words in _values().items()]
    return _SCRIPTS[shell].format(cases="\n".join(cases), values="\n".join(values), commands=" ".join(COMMANDS))


def _words(name: str) -> Iterator[str]:
    """Yield what may stand behind a command: its options, and the keys of those that take overrides."""
    from . import COMMANDS

    parser = ArgumentParser(add_help=False)
    COMMANDS[name].load().add_options(parser)
    for action in parser._actions:  # argparse has no other list of them  # noqa: SLF001
        yield from action.option_strings
        if not action.option_strings and action.choices:
            yield from map(str, action.choices)
    if name in _OVERRIDABLE:
        from wsiflow.run.config import known_keys

        yield from (f"{key}=" for key in (*_groups(), *_HYDRA, *known_keys()))
        yield from ("-m", "--multirun", "--config-dir", "--cfg", "--help")


def _values() -> dict[str, str]:
    """Return the values of keys and groups that have only a few, separated by blanks, by key."""
    from wsiflow.run.config import listed_values

    return {key: " ".join(values) for key, values in (listed_values() | _groups()).items()} | _HYDRA


def _groups() -> dict[str, tuple[str, ...]]:
    """Return the choices of the groups of the configuration by group."""
    from importlib import resources

    from ..overrides import choices

    folders = (entry.name for entry in resources.files("wsiflow.conf").iterdir() if entry.is_dir())
    return {name: tuple(choices(name)) for name in sorted(folders) if choices(name)}
