# shellcheck shell=bash
# `stop` and `restart`.

cmd_stop() {
  local name names=()
  if ((${#} == 0)) || [[ $1 == all ]]; then
    stop_everything
    return
  fi
  lock_for stop
  for name in "$@"; do
    load_part "$name" || die 3 not_running "$name"
    names+=("$name")
    if [[ ${PART[role]:-} == decode && ${PART[connector]:-} != own ]]; then say stopped_decode "$name"; fi
  done
  stop_parts "$STOP_TIMEOUT" "${names[@]}"
  release_lock
  good stopped "${names[*]}"
}

# The supervisor goes first, or it would start again what is being stopped; then the proxy, so that
# requests in flight still have their engines; then all engines at once.
stop_everything() {
  local name engines=() names=()
  [[ -d $RUN_DIR ]] || {
    say nothing_runs
    return 0
  }
  interrupt_all
  mapfile -t names < <(known_parts)
  if ((${#names[@]} == 0)); then
    say nothing_runs
    return 0
  fi
  stop_parts 30 supervisor
  lock_for stop
  mapfile -t names < <(known_parts)
  for name in "${names[@]}"; do
    if [[ $name != proxy ]]; then engines+=("$name"); fi
  done
  stop_parts "$STOP_TIMEOUT" proxy
  stop_parts "$STOP_TIMEOUT" "${engines[@]}"
  rm -f -- "$RUN_DIR/settings" "$RUN_DIR"/*.restarts
  release_lock
  good stopped "${names[*]}"
}

# An `all` that still starts is told to give up; it stops what it started.
interrupt_all() {
  local deadline=$((SECONDS + STOP_TIMEOUT + 15))
  if lock_holder && [[ $LOCK_COMMAND == all ]]; then
    say interrupting_all "$LOCK_PID"
    kill -TERM "$LOCK_PID" 2>/dev/null || true
    while read_stat "$LOCK_PID" && [[ $STAT_STATE != [ZX] ]] && ((SECONDS < deadline)); do sleep 0.1; done
  fi
}

cmd_restart() {
  local name more=() chosen=("$@")
  (($#)) || die 2 which_part restart
  lock_for restart
  ensure_python
  resolve_engine
  layout
  check_gpus
  for name in "$@"; do
    [[ -n ${PART_ROLE[$name]:-} ]] || die 2 no_such_part "$name" "${PARTS[*]}"
    if ! load_part "$name" && ! anything_alive; then die 3 not_running "$name"; fi
    if [[ ${PART[mode]:-} == foreground ]]; then die 1 in_foreground "$name"; fi
  done
  for name in "$@"; do
    [[ ${PART_ROLE[$name]} == decode ]] || continue
    mapfile -t more < <(paired_prefills "$name" "${chosen[@]}")
    if ((${#more[@]})); then say restart_prefills "${more[*]}" "$name"; fi
    chosen+=("${more[@]}")
  done
  set -- "${chosen[@]}"
  ask_proxy
  stop_parts "$STOP_TIMEOUT" "$@"
  STARTED=()
  trap 'release_lock' EXIT
  check_ports "$@"
  for name in "$@"; do
    rotate_log "$name"
    rm -f -- "$RUN_DIR/$name.restarts"
    launch "$name" "$LOG_DIR/$name.log"
    STARTED+=("$name")
  done
  for name in "$@"; do
    if [[ $name == proxy ]]; then
      await "$SECONDS" proxy_up proxy "$(text wait_proxy)"
    else
      await "$SECONDS" engine_ready "$name" "$(text wait_engine "$name")"
    fi
  done
  if part_alive proxy; then await "$SECONDS" pairs_ready proxy "$(text wait_pairs)"; fi
  trap - EXIT
  release_lock
  good restarted "$*"
}

# What the proxy knows of this machine's engines, by HTTP port: PROXY_COUNT (requests so far) and PROXY_STATE (in words);
# PROXY_FROZEN and PROXY_WANTS have its reason, only for engines that it calls frozen and for those that it wants
# restarted. All are empty when it cannot be asked.
declare -A PROXY_COUNT=() PROXY_STATE=() PROXY_FROZEN=() PROXY_WANTS=()
ask_proxy() {
  PROXY_COUNT=() PROXY_STATE=() PROXY_FROZEN=() PROXY_WANTS=()
  if proxy_get /stats && [[ $HTTP_STATUS == 200 ]]; then read_instances; fi
}

# HTTP_BODY, an answer of /stats. Engines of other machines may have the same ports.
read_instances() {
  local address count flying state wanted reason port
  while IFS=$'\t' read -r address count flying state wanted reason; do
    is_engine_host "${address%:*}" || continue
    port=${address##*:} reason=$(plain_line "$reason")
    PROXY_COUNT[$port]=$count
    PROXY_STATE[$port]=$(text status_flying "$state" "$flying" "$reason")
    if [[ $state == frozen ]]; then PROXY_FROZEN[$port]=$reason; fi
    if [[ $wanted == yes ]]; then PROXY_WANTS[$port]=$reason; fi
  done < <("$BASE_PYTHON" "$ROOT/script/instances.py" <<<"$HTTP_BODY" 2>/dev/null || true)
}

is_engine_host() {
  local host=${1#'['}
  host=${host%']'}
  [[ $host == "$ENGINE_HOST" || $host == "$(reach "$ENGINE_HOST")" || $host == "$(kv_host)" ]]
}

# Whether requests have gone to NAME since it was started. A proxy younger than the part has not counted them all,
# and a proxy that cannot be asked says nothing: then yes.
has_served() {
  local count since proxy_since=''
  load_part "$1" || return 0
  count=${PROXY_COUNT[${PART_HTTP[$1]}]:-} since=${PART[since]:-0}
  local before=${PART[served]:-0}
  if load_part proxy; then proxy_since=${PART[since]:-}; fi
  [[ -n $count && -n $proxy_since ]] && ((proxy_since <= since && count <= before)) || return 0
  return 1
}

# paired_prefills DECODE [EXCEPT...]: prefills that have sent KV to it. They stay frozen, or hold a dead NCCL
# communicator, once it is gone; those of this project's connector just connect anew.
paired_prefills() {
  local decode=$1 name
  local -a tied=()
  shift
  for name in "${PREFILLS[@]}"; do
    if [[ " $* " != *" $name "* ]] && load_part "$name" && [[ ${PART[connector]:-} != own ]]; then tied+=("$name"); fi
  done
  ((${#tied[@]})) || return 0
  ask_proxy
  has_served "$decode" || return 0
  for name in "${tied[@]}"; do
    if has_served "$name"; then printf '%s\n' "$name"; fi
  done
}
