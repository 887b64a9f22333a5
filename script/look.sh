# shellcheck shell=bash
# `status`, `logs` and `env`: looking without changing anything.

cmd_status() {
  local name worst=0 state ready simulated='' supervised='' loading=''
  local -a names=()
  mapfile -t names < <(known_parts)
  if ((${#names[@]} == 0)); then
    say nothing_runs
    return 3
  fi
  find_base_python
  if [[ -f $RUN_DIR/proxy.pid ]]; then ask_proxy; fi
  if part_alive supervisor; then supervised=1; fi
  printf '%-12s %-10s %-8s %-13s %-9s %-9s %s\n' NAME KIND PID PORTS STATE UPTIME READY
  for name in "${names[@]}"; do
    load_part "$name"
    if [[ ${PART[kind]:-} == sim ]]; then simulated=1; fi
    state=$PART_STATE ready=-
    if [[ $PART_STATE == alive ]]; then
      readiness
      ready=$READINESS
      case $HEALTH in
        loading) loading=1 ;;
        hung | frozen) state=$HEALTH worst=1 ;;
      esac
    else
      worst=1
      if [[ $PART_STATE == reused ]]; then state=dead; fi
      if [[ $PART_PID == 0 ]]; then state=waiting; fi
      if grep -qs '^state=given-up' "$RUN_DIR/$name.restarts"; then state=given-up; fi
    fi
    printf '%-12s %-10s %-8s %-13s %-9s %-9s %s\n' "$name" "$(kind_shown "${PART[kind]:-?}")" "$PART_PID" \
      "$(ports_shown)" "$state" "$(uptime_shown)" "$ready"
    remedy_shown "$name" "$supervised" "$state"
    restarts_shown "$name"
  done
  if pair_is_missing "$loading"; then
    worst=1
    complain status_no_pair "$MISSING"
  fi
  if [[ -n $simulated ]]; then warn status_sim; fi
  gpu_memory_shown
  return "$worst"
}

kind_shown() {
  if [[ $1 == sim ]]; then printf 'SIMULATED'; else printf '%s' "$1"; fi
}

ports_shown() {
  if [[ -n ${PART[http]:-} ]]; then printf '%s' "${PART[http]}${PART[kv]:+,${PART[kv]}}"; else printf -- '-'; fi
}

uptime_shown() {
  local now seconds
  printf -v now '%(%s)T' -1
  seconds=$((now - ${PART[since]:-now}))
  if [[ $PART_STATE != alive ]]; then printf -- '-'; else printf '%d:%02d:%02d' $((seconds / 3600)) $((seconds / 60 % 60)) $((seconds % 60)); fi
}

# How the loaded part, which is alive, serves: READINESS in words, and HEALTH:
#   ok        it answers
#   frozen    so the proxy says. An engine's own /health tells only that its HTTP side lives
#   loading   its HTTP port does not listen yet
#   hung      it listens without an answer, or without a good one
# The proxy also leaves MISSING: what keeps every pair from serving, empty when requests can be served.
READINESS='' HEALTH='' MISSING=''
readiness() {
  local port=${PART[http]:-}
  HEALTH=ok
  case ${PART[role]} in
    supervisor) READINESS=$(text status_watching) ;;
    proxy)
      MISSING=''
      if proxy_get /health && [[ $HTTP_BODY =~ \"pairs\":\ *([0-9]+) ]]; then
        READINESS=$(text status_pairs "${BASH_REMATCH[1]}")
        if [[ $HTTP_STATUS != 200 && $HTTP_BODY =~ \"missing\":\ *\[([^]]*)\] ]]; then
          MISSING=$(plain_line "${BASH_REMATCH[1]}")
          READINESS+=": $MISSING"
        fi
      else
        no_answer
      fi
      ;;
    *)
      if [[ -n ${PROXY_FROZEN[$port]:-} ]]; then
        HEALTH=frozen
      elif ! http_get "$(reach "$ENGINE_HOST")" "$port" /health || [[ $HTTP_STATUS != 200 ]]; then
        no_answer
        if [[ -n ${PROXY_WANTS[$port]:-} ]]; then READINESS+=" (${PROXY_WANTS[$port]})"; fi
        return 0
      fi
      if [[ -n ${PROXY_STATE[$port]:-} ]]; then
        READINESS=$(text status_proxy_says "$(plain_line "${PROXY_STATE[$port]}")" "${PROXY_COUNT[$port]}")
      else
        READINESS=$(text status_unknown)
      fi
      ;;
  esac
}

no_answer() {
  if ! port_taken "${PART[http]}"; then
    HEALTH=loading READINESS=$(text status_loading)
  elif [[ $HTTP_STATUS == 000 ]]; then
    HEALTH=hung READINESS=$(text status_silent)
  else
    HEALTH=hung READINESS=$(text status_bad "$HTTP_STATUS")
  fi
}

# pair_is_missing LOADING: whether `all` had everything up and no request can be served now. Not while an engine still
# loads, or while another command or the supervisor changes what runs.
pair_is_missing() {
  [[ -n $MISSING && -z $1 && -r $RUN_DIR/settings ]] && ! lock_holder
}

# What to do about an engine that must be restarted, where no supervisor does it.
remedy_shown() {
  [[ $PART_STATE == alive && ($3 == hung || -n ${PROXY_WANTS[${PART[http]:-none}]:-}) ]] || return 0
  if [[ ${PART[mode]:-} == foreground ]]; then
    printf '             %s\n' "$(text status_wanted_terminal)"
  elif [[ -z $2 ]]; then
    printf '             %s\n' "$(text status_wanted "$1")"
  fi
}

restarts_shown() {
  local key value count=0 state='' at=0 reason=''
  [[ -r $RUN_DIR/$1.restarts ]] || return 0
  while IFS='=' read -r key value; do
    case $key in
      count) count=$value ;;
      state) state=$value ;;
      at) at=$value ;;
      reason) reason=$value ;;
    esac
  done <"$RUN_DIR/$1.restarts"
  printf '             %s\n' "$(text status_restarts "$count" "$(printf '%(%H:%M:%S)T' "$at")" "$reason")"
  if [[ $state == given-up ]]; then printf '             %s\n' "$(text status_given_up "$LOG_DIR/$1.log")"; fi
}

gpu_memory_shown() {
  local index used
  read_gpus
  for index in "${GPU_INDEXES[@]}"; do
    used=$((GPU_TOTAL_MIB[$index] - GPU_FREE_MIB[$index]))
    printf 'GPU %s  %s  %d / %d MiB\n' "$index" "${GPU_NAME[$index]}" "$used" "${GPU_TOTAL_MIB[$index]}"
  done
}

# logs [NAME...] [-f] [-n LINES]
cmd_logs() {
  local follow='' lines=40 names=() files=() name file
  while (($#)); do
    case $1 in
      -f | --follow) follow=1 ;;
      -n)
        [[ ${2:-} =~ ^[0-9]+$ ]] || die 2 unknown_argument 'logs -n' "${2:-}"
        lines=$2
        shift
        ;;
      -*) die 2 unknown_argument logs "$1" ;;
      *) names+=("$1") ;;
    esac
    shift
  done
  if ((${#names[@]} == 0)); then
    for file in "$LOG_DIR"/*.log; do
      if [[ -f $file ]]; then files+=("$file"); fi
    done
  fi
  for name in "${names[@]}"; do
    file=$LOG_DIR/${name%.log}.log
    [[ $name != */* && -f $file ]] || die 3 no_log "$name" "$LOG_DIR"
    files+=("$file")
  done
  ((${#files[@]})) || die 3 no_logs "$LOG_DIR"
  if [[ -n $follow ]]; then exec tail -n "$lines" -F -- "${files[@]}"; fi
  if ((${#files[@]} == 1)); then tail -n "$lines" -- "${files[0]}"; else tail -v -n "$lines" -- "${files[@]}"; fi
}

# The exact commands, to copy. Nothing is installed or started for it, and ENGINE=vllm is printed without GPUs too.
cmd_env() {
  local name
  find_base_python
  if [[ $ENGINE == vllm ]]; then
    find_vllm || {
      # What pip would install, or the newest that has vLLM's own connector.
      VLLM_COMMAND=(vllm) VLLM_VERSION=0.$OWN_NEWEST.0 VLLM_CONNECTOR=no
      if [[ $KV_CONNECTOR == p2p_nccl ]]; then VLLM_VERSION=0.23.0 VLLM_CONNECTOR=yes; fi
      warn env_no_vllm "$VLLM_VERSION"
    }
    vllm_usable || die 1 "${PROBLEM[@]}"
    ENGINE_KIND=vllm
  fi
  resolve_engine
  layout
  PROXY_PYTHON=$BASE_PYTHON
  if [[ -n $(requirements_missing "$BASE_PYTHON") ]]; then PROXY_PYTHON=$VENV_DIR/bin/python; fi
  if [[ $ENGINE_KIND == sim ]]; then say env_sim "$ENGINE_WHY"; fi
  printf 'cd %s\n' "$(shell_quote "$ROOT")"
  for name in "${PARTS[@]}"; do
    printf '# %s\n' "$name"
    launch_line "$name"
  done
}
