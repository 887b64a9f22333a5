"""Completions for bash, zsh and fish: of ``disagg-proxy``, and of the script, which is its subcommand ``machine``.

``python -m tools.generate`` writes them; a test compares them.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable

from tools.command_line import PROGRAM, SCRIPT, Command, Option

_HEAD = "# Completion of disagg-proxy and {} for {}. Made by tools/completions.py: make tables\n"


def _offered(command: Command) -> list[str]:
    """Every word that may come next, values of options aside."""
    return [one.name for one in command.commands] + [*command.words, *(f for o in command.options for f in o.flags)]


def _brief(help: str) -> str:
    """The first clause: a shell shows one line."""
    return re.split(r"[:;] ", help)[0]


# -- bash

_BASH = r"""#
#   source completions/disagg-proxy.bash

_disagg_proxy() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} folder=. path='' choices='' index file
  if [[ $word == '=' ]]; then
    word=''
  elif [[ $before == '=' ]]; then
    before=${{COMP_WORDS[COMP_CWORD - 2]}}
  fi
  if [[ ${{COMP_WORDS[0]##*/}} == {script} ]]; then
    path=machine
    if [[ ${{COMP_WORDS[0]}} == */* ]]; then folder=${{COMP_WORDS[0]%/*}}; fi
  fi
  for ((index = 1; index < COMP_CWORD; index++)); do
    case "$path ${{COMP_WORDS[index]}}" in
{paths}
        path+=" ${{COMP_WORDS[index]}}"
        path=${{path# }}
        ;;
    esac
  done
  # The value of an option.
  case "${{path:-serve}} $before" in
{values}
    *)
      case $path in
{words}
      esac
      ;;
  esac
  case $path in
    {files})
      if [[ $word != -* ]]; then _disagg_proxy_files && return; fi
      ;;
  esac
  # What runs now, when it is where it is by default.
  case $path in
    {parts})
      for file in "${{RUN_DIR:-$folder/run}}"/*.pid; do
        file=${{file##*/}}
        if [[ $file == *[0-9].pid ]]; then choices+=" ${{file%.pid}}"; fi
      done
      ;;
  esac
  COMPREPLY=()
  while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -W "$choices" -- "$word")
}}

_disagg_proxy_files() {{
  compopt -o filenames 2>/dev/null
  COMPREPLY=()
  while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -f -- "$word")
}}

complete -F _disagg_proxy disagg-proxy {script} ./{script}
"""


def bash(program: Command) -> str:
    """completions/disagg-proxy.bash."""
    commands = program.all()
    paths = [f'"{" ".join(one.path[:-1])} {one.name}"' for one in commands if one.path]
    by_kind: dict[str, list[str]] = defaultdict(list)
    for command in commands[1:]:
        for option in command.options:
            if option.metavar:
                does = "return" if not option.choices else f"choices='{' '.join(option.choices)}'"
                does = "_disagg_proxy_files && return" if option.file else does
                by_kind[does] += [f"'{' '.join(command.path)} {flag}'" for flag in option.flags]
    by_words: dict[str, list[str]] = defaultdict(list)
    for command in commands:
        by_words[f"choices='{' '.join(_offered(command))}'"].append(f"'{' '.join(command.path)}'")
    return (_HEAD.format(SCRIPT, "bash") + _BASH).format(
        script=SCRIPT,
        paths=f"      {' | '.join(paths)})",
        values="\n".join(_case(patterns, does, 4) for does, patterns in by_kind.items()),
        words="\n".join(_case(patterns, does, 8) for does, patterns in by_words.items()),
        parts=" | ".join(f"'{' '.join(one.path)}'" for one in commands if one.parts),
        files=" | ".join(f"'{' '.join(one.path)}'" for one in commands if one.files),
    )


def _case(patterns: Iterable[str], does: str, indent: int) -> str:
    body = f"{' ' * (indent + 2)}{does}\n{' ' * (indent + 2)};;"
    return f"{' ' * indent}{' | '.join(patterns)})\n{body}"


# -- zsh

_ZSH = r"""#compdef disagg-proxy {script}
{head}#
#   copy it into a folder of $fpath, or: source it after compinit

_disagg_proxy_parts() {{
  local -a parts=({parts} ${{RUN_DIR:-$folder/run}}/*.pid(N:t:r))
  _describe -t parts part parts
}}

{functions}
if [[ $funcstack[1] == _disagg-proxy ]]; then
  _disagg_proxy "$@"
else
  compdef _disagg_proxy disagg-proxy {script}
fi
"""

_ZSH_BRANCH = r"""{name}() {{
  local curcontext=$curcontext state line
  local -a commands=(
{described}
  )
  _arguments -C \
{specs}    '1: :->command' \
    '*:: :->arguments'
  case $state in
    command) _describe -t commands command commands ;;
    arguments)
      case $line[1] in
{cases}
      esac
      ;;
  esac
}}
"""


_ZSH_SCRIPT = r"""  local folder=${{words[1]:h}}
  # The script's words begin with a command of `machine`.
  if [[ $service == {script} ]]; then
    _disagg_proxy_machine
    return
  fi
"""


def zsh(program: Command) -> str:
    """completions/_disagg-proxy."""
    functions = "\n".join(_zsh_function(one) for one in reversed(program.all()))
    functions = functions.replace("_disagg_proxy() {\n", "_disagg_proxy() {\n" + _ZSH_SCRIPT.format(script=SCRIPT))
    parts = next(one.words for one in program.all() if one.parts and one.name == "logs")
    return _ZSH.format(script=SCRIPT, head=_HEAD.format(SCRIPT, "zsh"), parts=" ".join(parts), functions=functions)


def _zsh_name(path: Iterable[str]) -> str:
    return "_".join(("_disagg_proxy", *path))


def _zsh_function(command: Command) -> str:
    name = _zsh_name(command.path)
    specs = [spec for option in command.options for spec in _zsh_options(option)]
    if command.commands:
        described = [f"    {_quoted(f'{one.name}:{_brief(one.help)}')}" for one in command.commands]
        cases = [f"        {one.name}) {_zsh_name(one.path)} ;;" for one in command.commands]
        return _ZSH_BRANCH.format(
            name=name,
            described="\n".join(described),
            specs="".join(f"    {spec} \\\n" for spec in specs),
            cases="\n".join(cases),
        )
    if command.parts:
        specs.append("'*: :_disagg_proxy_parts'")
    elif command.files:
        specs.append("'*: :_files'")
    elif command.words:
        specs.append(f"'*: :({' '.join(command.words)})'")
    return f"{name}() {{\n  _arguments {' '.join(('-s', '-S', *specs)) if not specs else _lines(specs)}\n}}\n"


def _lines(specs: Iterable[str]) -> str:
    return "\\\n" + " \\\n".join(f"    {spec}" for spec in specs)


def _zsh_options(option: Option) -> list[str]:
    help = _brief(option.help).replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    help = f"[{help}]" if help else ""
    value = ""
    if option.metavar:
        action = "_files" if option.file else f"({' '.join(option.choices)})" if option.choices else " "
        value = f":{option.metavar.replace(':', chr(92) + ':')}:{action}"
    star = "*" if option.repeated else ""
    return [_quoted(f"{star}{flag}{help}{value}") for flag in option.flags]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- fish

_FISH = r"""#
#   copy it to ~/.config/fish/completions, or: source it

set -g __disagg_proxy_paths {paths}

# Whether the words so far are those of this command.
function __disagg_proxy_at
    set -l words (commandline -opc)
    set -l path
    string match -q '*{script}' -- $words[1]; and set path machine
    for word in $words[2..-1]
        contains -- (string join ' ' $path $word) $__disagg_proxy_paths; and set path $path $word
    end
    test (string join ' ' -- $path '') = (string join ' ' -- $argv '')
end

# The parts that run, when they are where they are by default.
function __disagg_proxy_running
    set -l folder (string replace -r '/?[^/]*$' '' -- (commandline -opc)[1])
    test -n "$folder"; or set folder .
    set -q RUN_DIR; and set -l run $RUN_DIR; or set -l run $folder/run
    set -l files $run/*.pid
    string replace -rf '.*/([^/]*[0-9])\.pid$' '$1' -- $files
end

for name in disagg-proxy {script}
    complete -c $name -f
{lines}
end
"""


def fish(program: Command) -> str:
    """completions/disagg-proxy.fish."""
    lines = []
    for command in program.all():
        at = f"    complete -c $name -n {shlex.quote(shlex.join(('__disagg_proxy_at', *command.path)))}"
        lines += [f"{at} -a {one.name} -d {_fish_quoted(_brief(one.help))}" for one in command.commands]
        if command.words:
            lines.append(f"{at} -a {_fish_quoted(' '.join(command.words))}")
        if command.parts:
            lines.append(f"{at} -a '(__disagg_proxy_running)'")
        if command.files:
            lines.append(f"{at} -F")
        for option in command.options:
            spelt = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in option.flags)
            takes = " -r -F" if option.file else " -x" if option.metavar else ""
            takes += f" -a {_fish_quoted(' '.join(option.choices))}" if option.choices else ""
            about = f" -d {_fish_quoted(_brief(option.help))}" if option.help else ""
            lines.append(f"{at} {spelt}{takes}{about}")
    paths = " ".join(f"'{' '.join(one.path)}'" for one in program.all() if one.path)
    return (
        (_HEAD.format(SCRIPT, "fish") + _FISH)
        .replace("{paths}", paths)
        .replace("{script}", SCRIPT)
        .replace("{lines}", "\n".join(lines))
    )


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


FILES = {f"completions/{PROGRAM}.bash": bash, f"completions/_{PROGRAM}": zsh, f"completions/{PROGRAM}.fish": fish}
"""Path in the repository -> what makes it."""
