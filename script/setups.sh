# shellcheck shell=bash
# `bench` with setups that do not run yet: each is started, measured and stopped, and what ran before comes back.
# Each `all` and `stop` is a run of this script, with the settings of this one.

BENCH_WAS_RUNNING='' BENCH_SUPERVISED='' BENCH_CHANGED=''
BENCH_SETUP=0 BENCH_SETUPS=1 # of how many
POOL=()
BENCH_EXPORTED=() # names of the settings that were not defaults

# bench_setups RATIO PLAIN
bench_setups() {
  local ratio=$1 plain=$2 name prefills question=sweep
  find_base_python
  for name in $(known_parts); do
    if part_alive "$name" && [[ ${PART[mode]:-} == foreground ]]; then die 1 in_foreground "$name"; fi
  done
  if anything_alive; then
    BENCH_WAS_RUNNING=1
    if part_alive supervisor; then BENCH_SUPERVISED=1; fi
  elif [[ -z $ratio ]]; then
    need_proxy
    die 1 bench_not_ours "$SERVICE_URL"
  fi
  for name in "${SETTING_NAMES[@]}"; do
    if [[ ${SETTING_SOURCE[$name]} != default && -n ${!name} ]]; then BENCH_EXPORTED+=("$name"); fi
  done
  resolve_engine
  BENCH_KIND=$ENGINE_KIND
  bench_pool "$ratio"
  if [[ -n $ratio ]]; then BENCH_SETUPS=$((${#POOL[@]} - 1)); else BENCH_SETUP=1; fi
  if [[ -n $plain ]]; then BENCH_SETUPS=$((BENCH_SETUPS + 1)); fi
  bench_begin
  trap 'bench_setups_end $?' EXIT
  trap 'bench_signal 130' INT
  trap 'bench_signal 143' TERM HUP
  SERVICE_URL=http://$(authority "$HTTP_PROXY_HOST" "$HTTP_PROXY_PORT")
  if [[ -z $ratio ]]; then
    measure pd "$(pd_title "${#PREFILLS[@]}" "${#DECODES[@]}")" pd sweep "${#POOL[@]}" $((${#PREFILLS[@]} * ${#DECODES[@]})) \
      "$SERVICE_URL"
  else
    question=ratio
    for ((prefills = 1; prefills < ${#POOL[@]}; prefills++)); do measure_split "$prefills"; done
  fi
  if [[ -n $plain ]]; then measure_plain "$question"; fi
}

# The engines' GPUs in POOL, each entry as in PREFILL_GPUS: what runs; for --ratio the GPUs of PREFILL_GPUS and
# DECODE_GPUS, else all of this machine in groups of TENSOR_PARALLEL. Simulated engines are just counted.
bench_pool() {
  local at name gpus width=$TENSOR_PARALLEL
  local -A taken=()
  POOL=()
  if [[ -z $1 || -n $PREFILL_GPUS$DECODE_GPUS ]]; then
    layout
    for name in "${PREFILLS[@]}" "${DECODES[@]}"; do POOL+=("${PART_GPUS[$name]//,/+}"); done
  elif [[ $BENCH_KIND == sim ]]; then
    for ((at = 0; at < BENCH_SIM_ENGINES; at++)); do POOL+=("$at"); done
  else
    read_gpus
    for ((at = 0; at + width <= ${#GPU_INDEXES[@]}; at += width)); do
      gpus=$(printf '%s+' "${GPU_INDEXES[@]:at:width}")
      POOL+=("${gpus%+}")
    done
  fi
  ((${#POOL[@]} >= 2)) || die 1 bench_pool_small "${#POOL[@]}"
  for gpus in "${POOL[@]}"; do
    for name in ${gpus//+/ }; do
      if [[ -n ${taken[$name]:-} ]]; then die 1 bench_pool_twice "$name"; fi
      taken[$name]=1
    done
  done
}

joined() {
  local IFS=,
  printf '%s' "$*"
}

# again [NAME=VALUE...] COMMAND...: this script once more with this one's settings, and others on top. They go through the
# environment, where `ps` of other users does not show keys.
again() {
  local -a changes=()
  while [[ $1 == *=* ]]; do
    changes+=("$1")
    shift
  done
  (
    trap - INT TERM HUP EXIT
    if ((${#BENCH_EXPORTED[@]})); then export "${BENCH_EXPORTED[@]?}"; fi
    exec env BENCH_CHILD=1 "${changes[@]}" "$BASH" "$SELF" "$@" >/dev/null
  )
}

# What runs makes room for another setup.
make_room() {
  BENCH_SETUP=$((BENCH_SETUP + 1))
  say bench_setup "$1" "$BENCH_SETUP" "$BENCH_SETUPS"
  BENCH_CHANGED=1
  again stop
}

# measure_split PREFILLS: that many of the pool, the others decode.
measure_split() {
  local prefills=$1 decodes=$((${#POOL[@]} - $1)) title
  title=$(pd_title "$prefills" "$decodes")
  make_room "$title"
  again "PREFILL_GPUS=$(joined "${POOL[@]:0:prefills}")" "DECODE_GPUS=$(joined "${POOL[@]:prefills}")" all --no-supervise
  measure "p${prefills}d$decodes" "$title" pd ratio "${#POOL[@]}" $((prefills * decodes)) "$SERVICE_URL"
}

# measure_plain QUESTION: an engine by itself on each entry of the pool, no proxy and no KV transfer.
measure_plain() {
  local question=$1 at name title="${#POOL[@]} plain engines"
  local -a urls=()
  make_room "$title"
  lock_for bench
  STARTED=()
  for ((at = 0; at < ${#POOL[@]}; at++)); do
    name=plain$((at + 1))
    PART_ROLE[$name]=plain PART_HTTP[$name]=$((PREFILL_HTTP_PORT + at)) PART_GPUS[$name]=${POOL[at]//+/,}
    check_ports "$name"
    rotate_log "$name"
    STARTED+=("$name")
    launch "$name" "$LOG_DIR/$name.log"
    urls+=("http://$(authority "$ENGINE_HOST" "${PART_HTTP[$name]}")")
  done
  for name in "${STARTED[@]}"; do await "$SECONDS" engine_ready "$name" "$(text wait_engine "$name")"; done
  release_lock
  BENCH_KEY=$ENGINE_API_KEY
  measure plain "$title" plain "$question" "${#POOL[@]}" "${#POOL[@]}" "${urls[@]}"
}

# bench_setups_end STATUS: the summary, then what ran before. Another Ctrl+C leaves everything stopped.
bench_setups_end() {
  local status=$1
  trap - EXIT
  trap 'exit 130' INT
  progress_clear
  release_lock
  bench_write || status=$((status ? status : 1))
  if [[ -n $BENCH_CHANGED ]]; then
    again stop || status=$((status ? status : 1))
    if [[ -n $BENCH_WAS_RUNNING ]]; then
      say bench_restoring
      again all "$([[ -n $BENCH_SUPERVISED ]] && printf -- --supervise || printf -- --no-supervise)" || status=$((status ? status : 1))
    fi
  fi
  exit "$status"
}
