# shellcheck shell=bash
# `page` and `top`: the proxy's live page, in a browser and in a terminal.

# The address on stdout, alone. It is opened only where a person sits in front of a desktop.
cmd_page() {
  (($# == 0)) || die 2 unknown_argument page "$1"
  need_proxy
  printf '%s/\n' "$SERVICE_URL"
  if [[ -n $API_KEY ]]; then say page_key; fi
  if [[ -t 2 && -n ${DISPLAY:-}${WAYLAND_DISPLAY:-} ]] && type -P xdg-open >/dev/null &&
    xdg-open "$SERVICE_URL/" </dev/null >/dev/null 2>&1; then
    say page_opened
  else
    say page_hint "$HTTP_PROXY_PORT" "$(authority "$HTTP_PROXY_HOST" "$HTTP_PROXY_PORT")"
  fi
}

cmd_top() {
  (($# == 0)) || [[ $# == 1 && $1 == --once ]] || die 2 unknown_argument top "$1"
  need_proxy
  ensure_python
  ensure_rich
  pass_keys
  cd -- "$ROOT"
  exec "$PROXY_PYTHON" -m disagg_proxy top --url "$SERVICE_URL" "$@"
}

# Only an environment that this script has made is its to install into.
ensure_rich() {
  local log=$LOG_DIR/venv.log
  if "$PROXY_PYTHON" -c 'import rich' 2>/dev/null; then return 0; fi
  [[ $PROXY_PYTHON == "$VENV_DIR/bin/python" ]] || die 1 top_no_rich "$PROXY_PYTHON"
  say top_installing "$VENV_DIR" "$log"
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$PROXY_PYTHON" -m pip install --no-input --quiet -r "$ROOT/requirements-top.txt" >>"$log" 2>&1 ||
    venv_failed "$log"
}
