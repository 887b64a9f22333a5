#!/usr/bin/env bash
# One machine, one script: the proxy, prefill and decode engines, from set-up to stop.
#
#   ./test_single_machine.sh            the menu
#   ./test_single_machine.sh all        everything in the background
#   ./test_single_machine.sh help       commands, settings, exit codes
#
# This file finds a Python and shows the menu; every command is the Python package disagg_machine beside it, which
# needs the standard library only (`disagg-proxy machine` is the same).
#
# Data goes to stdout, messages to stderr.
# Exit codes: 0 all went well; 1 something failed; 2 wrong usage or a bad setting;
# 3 nothing is running (status, stop NAME, test, bench, logs); 130 interrupted; 143 terminated.

if [ -z "${BASH_VERSION:-}" ]; then
  exec bash "$0" "$@"
fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "test_single_machine.sh: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi
set -Eeuo pipefail
shopt -s inherit_errexit

SELF=$(readlink -f -- "${BASH_SOURCE[0]}")
ROOT=${SELF%/*}
readonly SELF ROOT

# Any Python that can run the package; which one runs the proxy is the package's decision. The user's choice goes
# first, so that a wrong one does not keep `stop` from working.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 "${VENV_DIR:-$ROOT/.venv}/bin/python" python3.{14,13,12,11,10}; do
    if [[ -n $candidate ]] && candidate=$(type -P -- "$candidate") &&
      "$candidate" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      MACHINE=("$candidate" -I -S -X utf8 "$ROOT/disagg_machine/__main__.py" "--script=$0")
      return 0
    fi
  done
  case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in
    zh*) echo "${0##*/}: 找不到 3.10 或更新的 Python；请用 PYTHON 指定" >&2 ;;
    *) echo "${0##*/}: no Python 3.10 or newer found; set PYTHON to one" >&2 ;;
  esac
  exit 1
}

# The texts of the menu, in the user's language, from the package.
read_menu() {
  local lines number command text
  lines=$("${MACHINE[@]}" __menu)
  {
    read -r TITLE
    IFS= read -r PROMPT
    IFS= read -r WHICH
    IFS= read -r BENCH_HOW
    read -r UNKNOWN
    read -r ENDED
    while read -r number command text; do ENTRIES+=("$number|$command|$text"); done
  } <<<"$lines"
}

show_menu() {
  local entry number command text bold='' off=''
  if [[ -t 2 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then bold=$'\e[1m' off=$'\e[0m'; fi
  printf '\n%s%s%s\n' "$bold" "$TITLE" "$off" >&2
  for entry in "${ENTRIES[@]}"; do
    IFS='|' read -r number command text <<<"$entry"
    if ((number)); then printf ' %2s) %-9s %s\n' "$number" "$command" "$text" >&2; else printf ' %2s) %s\n' 0 "$text" >&2; fi
  done
}

# say FORMAT WORD...: a format of the package's texts.
say() {
  # shellcheck disable=SC2059  # that is what it is
  printf -- "$1\n" "${@:2}" >&2
}

# Each entry runs this script with a command, so menu and commands cannot differ, and a command that fails or is
# interrupted returns here.
menu() {
  local choice entry number command text chosen
  ENTRIES=()
  read_menu
  while :; do
    show_menu
    trap 'printf "\n" >&2; exit 130' INT
    if ! read -r -p "$PROMPT" choice; then
      printf '\n' >&2
      return 0
    fi
    choice=${choice//[[:space:]]/}
    if [[ -z $choice ]]; then continue; fi
    if [[ $choice == 0 || $choice == q ]]; then return 0; fi
    chosen=''
    for entry in "${ENTRIES[@]}"; do
      IFS='|' read -r number command text <<<"$entry"
      if [[ $choice == "$number" || $choice == "$command" ]]; then chosen=$command; fi
    done
    if [[ -z $chosen || $chosen == quit ]]; then say "$UNKNOWN" "$choice"; else run_entry "$chosen"; fi
  done
}

run_entry() {
  local status=0 part=''
  if [[ $1 == bench ]]; then
    read -r -p "$BENCH_HOW" part || return 0
    part=${part//[[:space:]]/}
    case $part in
      '' | 1) part='' ;;
      2) part=--ratio ;;
      3) part=--against-plain ;;
      4) part=--once ;;
      5) part=--clocks ;;
      *)
        say "$UNKNOWN" "$part"
        return 0
        ;;
    esac
  elif [[ $1 == restart ]]; then
    read -r -p "$WHICH" part || return 0
    part=${part//[[:space:]]/}
    if [[ -z $part ]]; then return 0; fi
  fi
  # Caught, not ignored: the command gets Ctrl+C as usual, and the menu stays.
  trap ':' INT
  "${MACHINE[@]}" "$1" ${part:+"$part"} || status=$?
  if ((status)); then say "$ENDED" "$1" "$status"; fi
}

find_python
if [[ ${1:-} == menu || ($# == 0 && -t 0) ]]; then menu; else exec "${MACHINE[@]}" "$@"; fi
