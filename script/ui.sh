# shellcheck shell=bash
# What the user sees: messages on stderr in the user's language, colours, the progress line.

declare -A MESSAGE=()
UI_LANGUAGE=en
COLOR_RED='' COLOR_GREEN='' COLOR_YELLOW='' COLOR_BOLD='' COLOR_OFF=''
PROGRESS_SHOWN=''
PROGRESS_LAST=''
PROGRESS_AT=0

ui_init() {
  local key en zh
  case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in
    zh*) UI_LANGUAGE=zh ;;
  esac
  while IFS='|' read -r key en zh; do
    [[ -n $key ]] || continue
    if [[ $UI_LANGUAGE == zh ]]; then MESSAGE[$key]=$zh; else MESSAGE[$key]=$en; fi
  done <<<"$MESSAGE_TABLE"
  if [[ -t 2 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
    COLOR_RED=$'\e[31m' COLOR_GREEN=$'\e[32m' COLOR_YELLOW=$'\e[33m' COLOR_BOLD=$'\e[1m' COLOR_OFF=$'\e[0m'
  fi
}

# text KEY [ARGUMENT...]: the message on stdout, without a newline.
# A message numbers its %N$s when its language wants another order; bash's printf knows %s only.
text() {
  local template=${MESSAGE[$1]} number
  shift
  if [[ $template == *'%'[1-9]'$s'* ]]; then
    template=${template//%%/%}
    for ((number = 1; number <= $#; number++)); do template=${template//"%$number\$s"/"${!number}"}; done
    printf '%s' "$template"
  else
    # shellcheck disable=SC2059  # the format is the message table's
    printf -- "$template" "$@"
  fi
}

# One line on stderr. A terminal that has gone away must not stop the one who cleans up.
emit() {
  progress_clear
  { printf '%s\n' "$1" >&3; } 3>&2 2>/dev/null || true
}

say() { emit "$(text "$@")"; }

good() { emit "$COLOR_GREEN$(text "$@")$COLOR_OFF"; }

warn() { emit "$COLOR_YELLOW$(text "$@")$COLOR_OFF"; }

complain() { emit "${COLOR_RED}test_single_machine.sh: $(text "$@")$COLOR_OFF"; }

# die CODE KEY [ARGUMENT...]
die() {
  local code=$1
  shift
  complain "$@"
  exit "$code"
}

# A box that cannot be overlooked; arguments are whole lines.
loud() {
  local line
  emit "$COLOR_YELLOW$COLOR_BOLD************************************************************"
  for line in "$@"; do emit "*** $line"; done
  emit "************************************************************$COLOR_OFF"
}

# Text from a log, safe to show: no control characters.
plain_line() {
  local line=$1
  line=${line//[[:cntrl:]]/ }
  printf '%s' "$line"
}

show_log_tail() {
  local file=$1 lines=${2:-15} line
  [[ -s $file ]] || return 0
  say log_tail "$lines" "$file"
  while IFS= read -r line; do
    emit "    $(plain_line "$line")"
  done < <(tail -n "$lines" -- "$file")
}

# progress WHAT ELAPSED LOG: one line that is written over on a terminal; elsewhere a line when WHAT
# changes and every ten seconds.
progress() {
  local what=$1 elapsed=$2 log=$3 last='' line width wide
  if [[ -n $log && -s $log ]]; then last=$(plain_line "$(tail -n 1 -- "$log")"); fi
  line=$(text waiting_for "$what" "$elapsed")
  if [[ -t 2 ]]; then
    width=${COLUMNS:-0}
    if ((width == 0)); then width=$(tput cols 2>/dev/null || echo 80); fi
    if [[ -n $last ]]; then line+=" | $last"; fi
    # Chinese characters take two columns.
    wide=${line//[[:ascii:]]/}
    width=$((width - 1 - ${#wide}))
    { printf '\r\e[K%s' "${line:0:width>20?width:20}" >&3; } 3>&2 2>/dev/null || true
    PROGRESS_SHOWN=1
  elif [[ $what != "$PROGRESS_LAST" ]] || ((elapsed >= PROGRESS_AT + 10)); then
    { printf '%s%s\n' "$line" "${last:+ | $last}" >&3; } 3>&2 2>/dev/null || true
    PROGRESS_AT=$elapsed
  fi
  PROGRESS_LAST=$what
}

progress_clear() {
  if [[ -n $PROGRESS_SHOWN ]]; then { printf '\r\e[K' >&3; } 3>&2 2>/dev/null || true; fi
  PROGRESS_SHOWN=''
}
