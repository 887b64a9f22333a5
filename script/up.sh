# shellcheck shell=bash
# `all`: everything in the background. What this call started is stopped again when one part fails.

STARTED=()

cmd_all() {
  local supervise=$SUPERVISE name
  while (($#)); do
    case $1 in
      --supervise) supervise=1 ;;
      --no-supervise) supervise=0 ;;
      *) die 2 unknown_argument all "$1" ;;
    esac
    shift
  done
  lock_for all
  if already_running; then
    release_lock
    return 0
  fi
  trap 'roll_back 130' INT
  trap 'roll_back 143' TERM HUP
  trap 'roll_back_quietly $?' EXIT
  ensure_python
  resolve_engine
  layout
  check_gpus
  # `bench` has said it already.
  if [[ -z ${BENCH_CHILD:-} ]]; then announce; fi
  check_ports "${PARTS[@]}"
  # A supervisor whose parts are all gone would bring them back beside the new ones.
  stop_parts 30 supervisor
  for name in $(known_parts); do sweep "$name"; done
  write_running_settings
  rm -f -- "$RUN_DIR"/*.restarts
  start_all
  if ((supervise)); then
    STARTED+=(supervisor)
    start_supervisor
  fi
  trap - INT TERM HUP EXIT
  release_lock
  if [[ -z ${BENCH_CHILD:-} ]]; then report_ready; fi
}

# Everything there: says so, and that is no failure. Only a part: what to do, exit 1.
already_running() {
  local name alive=() gone=()
  for name in $(known_parts); do
    if [[ $name == supervisor ]]; then continue; fi
    if part_alive "$name"; then alive+=("$name (PID $PART_PID)"); else gone+=("$name"); fi
  done
  ((${#alive[@]})) || return 1
  resolve_engine
  layout
  for name in "${PARTS[@]}"; do
    if ! load_part "$name"; then gone+=("$name"); fi
  done
  if ((${#gone[@]})); then die 1 partly_running "${alive[*]}" "${gone[*]}"; fi
  say already_running "${alive[*]}" "http://$(authority "$HTTP_PROXY_HOST" "$HTTP_PROXY_PORT")"
}

announce() {
  local name
  if [[ $ENGINE_KIND == sim ]]; then
    loud "$(text loud_sim)" "$(text loud_why "$ENGINE_WHY")" "$(text loud_sim_how)"
  else
    say using_vllm "$VLLM_VERSION" "$(connector_shown)" "${VLLM_COMMAND[*]}"
    if own_untried; then warn own_untried "$VLLM_VERSION"; fi
    if chunks_may_kill; then warn chunked_warning "$MAX_NUM_BATCHED_TOKENS" "$MAX_MODEL_LEN"; fi
  fi
  for name in "${PARTS[@]}"; do
    if [[ $name == proxy ]]; then
      say part_proxy "$HTTP_PROXY_PORT" "$PROXY_PORT"
    elif [[ $ENGINE_KIND == vllm ]]; then
      say part_engine "$name" "${PART_HTTP[$name]}" "${PART_KV[$name]}" "$(text on_gpu "${PART_GPUS[$name]}")"
    else
      say part_engine "$name" "${PART_HTTP[$name]}" "${PART_KV[$name]}" "$(text simulated)"
    fi
  done
}

# Nothing is started while a port is taken: which one, and by whom.
check_ports() {
  local name port bad=0
  for name in "$@"; do
    for port in $(ports_of "$name"); do
      if port_taken "$port"; then
        complain port_taken "$port" "$name" "$(port_holder "$port")"
        bad=1
      fi
    done
  done
  ((bad == 0)) || die 1 ports_remedy
}

# What a dead part left: its children, then its file.
sweep() {
  if load_part "$1" && [[ $PART_STATE != alive ]]; then stop_parts 5 "$1"; fi
}

start_all() {
  local name other started_at=$SECONDS
  local -a earlier=()
  for name in "${PARTS[@]}"; do
    for other in "${earlier[@]}"; do
      if [[ $ENGINE_KIND == vllm && $other != proxy ]] && share_gpu "$name" "$other"; then
        await "$started_at" engine_ready "$other" "$(text wait_shared "$other" "$name")"
      fi
    done
    rotate_log "$name"
    STARTED+=("$name")
    launch "$name" "$LOG_DIR/$name.log"
    earlier+=("$name")
    if [[ $name == proxy ]]; then await "$started_at" proxy_up proxy "$(text wait_proxy)"; fi
  done
  for name in "${PARTS[@]:1}"; do
    await "$started_at" engine_ready "$name" "$(text wait_engine "$name")"
  done
  await "$started_at" pairs_ready proxy "$(text wait_pairs)"
}

proxy_up() {
  proxy_get /livez && [[ $HTTP_STATUS == 200 ]]
}

engine_ready() {
  http_get "$(reach "$ENGINE_HOST")" "${PART_HTTP[$1]}" /health && [[ $HTTP_STATUS == 200 ]]
}

# All engines of this layout are ready in the proxy's eyes, not just one pair.
pairs_ready() {
  proxy_get /health && [[ $HTTP_STATUS == 200 ]] || return 1
  ready_count prefill "${#PREFILLS[@]}" && ready_count decode "${#DECODES[@]}"
}

ready_count() {
  [[ $HTTP_BODY =~ \"$1\":\ *\{[^}]*\"ready\":\ *([0-9]+) ]] && ((BASH_REMATCH[1] >= $2))
}

# await SINCE TEST NAME WHAT: until TEST NAME is true; a child that died is noticed at once, not after the timeout.
await() {
  local since=$1 check=$2 name=$3 what=$4 limit=$START_TIMEOUT part
  if [[ -z $limit ]]; then
    limit=120
    if [[ $ENGINE_KIND == vllm ]]; then limit=1800; fi
  fi
  while :; do
    for part in "${STARTED[@]}"; do
      if ! part_alive "$part"; then start_failed "$part"; fi
    done
    if "$check" "$name"; then break; fi
    if ((SECONDS - since >= limit)); then
      complain start_timeout "$what" "$limit"
      show_log_tail "$LOG_DIR/$name.log" 15
      exit 1
    fi
    progress "$what" "$((SECONDS - since))" "$LOG_DIR/$name.log"
    sleep 0.2
  done
  progress_clear
}

start_failed() {
  local name=$1
  complain part_died "$name" "$PART_PID"
  show_log_tail "$LOG_DIR/$name.log" 20
  explain_log "$LOG_DIR/$name.log"
  exit 1
}

# What well-known last words of an engine mean.
explain_log() {
  local tail
  tail=$(tail -n 200 -- "$1" 2>/dev/null) || return 0
  case $tail in
    *'No available memory for the cache blocks'*) say hint_memory ;;
    *'less than desired GPU memory utilization'*) say hint_memory ;;
    *'CUDA out of memory'*) say hint_memory ;;
    *'Address already in use'* | *'address already in use'*) say hint_port ;;
    *'is not a valid model identifier'* | *'Repository Not Found'*) say hint_model "$MODEL" ;;
    *'Duplicate GPU detected'*) say hint_duplicate ;;
  esac
}

roll_back() {
  trap '' INT TERM HUP
  trap - EXIT
  progress_clear
  say interrupted
  undo
  exit "$1"
}

roll_back_quietly() {
  trap '' INT TERM HUP
  undo
  exit "$1"
}

undo() {
  local index reversed=()
  for ((index = ${#STARTED[@]} - 1; index >= 0; index--)); do reversed+=("${STARTED[index]}"); done
  if ((${#reversed[@]})); then
    say rolling_back "${reversed[*]}"
    stop_parts "$STOP_TIMEOUT" "${reversed[@]}"
    rm -f -- "$RUN_DIR/settings"
  fi
  release_lock
}

report_ready() {
  local name url
  url=http://$(authority "$HTTP_PROXY_HOST" "$HTTP_PROXY_PORT")
  served_names
  good all_ready "$url"
  for name in $(known_parts); do
    load_part "$name"
    printf '%-12s PID %-8s %s\n' "$name" "$PART_PID" "${PART[log]}"
  done
  say try_it
  printf 'curl %s%s/v1/completions -H "Content-Type: application/json" %s-d %s\n' \
    "$([[ -n ${http_proxy:-}${all_proxy:-}${ALL_PROXY:-} ]] && printf -- "--noproxy '*' " || true)" "$url" \
    "$([[ -n $API_KEY ]] && printf '%s' "-H \"Authorization: Bearer \$API_KEY\" " || true)" \
    "$(shell_quote "{\"model\": \"${SERVED_NAMES[0]}\", \"prompt\": \"San Francisco is a\", \"max_tokens\": 32, \"stream\": true}")"
  say watch_it "$url"
  say next_commands "$0"
}
