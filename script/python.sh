# shellcheck shell=bash
# Which Python runs the proxy and the simulated engines, and the virtual environment when one is needed.
# BASE_PYTHON is the user's; PROXY_PYTHON has everything in requirements-proxy.txt.

BASE_PYTHON=''
PROXY_PYTHON=''
REQUIREMENTS=$ROOT/requirements-proxy.txt

find_base_python() {
  [[ -z $BASE_PYTHON ]] || return 0
  BASE_PYTHON=$(type -P -- "$PYTHON") || die 1 no_python "$PYTHON"
  "$BASE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die 1 python_too_old "$BASE_PYTHON" "$("$BASE_PYTHON" -V 2>&1 || true)"
}

# What is missing or too old in a Python, one word each; empty when nothing is.
requirements_missing() {
  "$1" "$ROOT/script/requirements_met.py" "$REQUIREMENTS" 2>/dev/null || printf 'python '
}

ensure_python() {
  local missing
  [[ -z $PROXY_PYTHON ]] || return 0
  find_base_python
  missing=$(requirements_missing "$BASE_PYTHON")
  if [[ -z $missing ]]; then
    PROXY_PYTHON=$BASE_PYTHON
    if [[ -z ${BENCH_CHILD:-} ]]; then say python_chosen "$PROXY_PYTHON"; fi
    return 0
  fi
  if venv_ready; then
    PROXY_PYTHON=$VENV_DIR/bin/python
    if [[ -z ${BENCH_CHILD:-} ]]; then say python_venv "$PROXY_PYTHON"; fi
    return 0
  fi
  say python_lacks "$BASE_PYTHON" "$missing"
  make_venv
  PROXY_PYTHON=$VENV_DIR/bin/python
}

# What the environment was made from; a changed requirements file makes it out of date.
venv_stamp() {
  cksum <"$REQUIREMENTS"
}

venv_ready() {
  [[ -r $VENV_DIR/.proxy-requirements && $(<"$VENV_DIR/.proxy-requirements") == "$(venv_stamp)" ]] &&
    [[ -x $VENV_DIR/bin/python ]] && "$VENV_DIR/bin/python" -c '' 2>/dev/null
}

# Two commands of one checkout may come here at once: the folder above the environment is the lock.
make_venv() {
  local fd parent=${VENV_DIR%/*} log=$LOG_DIR/venv.log
  if [[ -d $VENV_DIR && ! -f $VENV_DIR/pyvenv.cfg && -n $(ls -A -- "$VENV_DIR") ]]; then
    die 1 venv_not_ours "$VENV_DIR"
  fi
  mkdir -p -- "${parent:-/}" "$LOG_DIR"
  exec {fd}<"${parent:-/}"
  flock "$fd"
  if ! venv_ready; then
    if [[ ! -x $VENV_DIR/bin/python ]] || ! "$VENV_DIR/bin/python" -m pip --version >/dev/null 2>&1; then
      "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null || die 1 no_venv_module "$(venv_remedy)"
      say venv_making "$VENV_DIR" "$log"
      "$BASE_PYTHON" -m venv --clear -- "$VENV_DIR" >"$log" 2>&1 || venv_failed "$log"
    else
      say venv_updating "$VENV_DIR" "$log"
      : >"$log"
    fi
    rm -f -- "$VENV_DIR/.proxy-requirements"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV_DIR/bin/python" -m pip install --no-input --quiet -r "$REQUIREMENTS" >>"$log" 2>&1 ||
      venv_failed "$log"
    venv_stamp >"$VENV_DIR/.proxy-requirements"
    good venv_made "$VENV_DIR"
  fi
  exec {fd}<&-
}

venv_failed() {
  show_log_tail "$1" 12
  die 1 venv_failed "$1"
}

# The exact line that brings `python -m venv` to a Debian or Ubuntu machine.
venv_remedy() {
  local package='' sudo='sudo '
  package=$("$BASE_PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if ((EUID == 0)); then sudo=''; fi
  if type -P apt-get >/dev/null; then
    printf '%sapt-get update && %sapt-get install -y %s' "$sudo" "$sudo" "$package"
  else
    text install_venv_module "$package"
  fi
}

# split_words TEXT: shell-quoted words into WORDS, nothing expanded or run.
split_words() {
  WORDS=()
  [[ -n ${1//[[:space:]]/} ]] || return 0
  find_base_python
  mapfile -d '' -t WORDS < <("$BASE_PYTHON" -c 'import shlex, sys
for word in shlex.split(sys.argv[1]):
    sys.stdout.write(word + "\0")' "$1" 2>/dev/null || printf '\0\0')
  if ((${#WORDS[@]} == 2)) && [[ -z ${WORDS[0]}${WORDS[1]} ]]; then die 2 bad_quotes "$1"; fi
}
