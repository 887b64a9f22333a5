# shellcheck shell=bash
# `doctor`: each line ok, warning or error, with the remedy. Changes nothing. Exit code 1 when there is an error.

DOCTOR_ERRORS=0
DOCTOR_WARNINGS=0

verdict_ok() { printf '%s[%s]%s %s\n' "$COLOR_GREEN" "$(text doctor_ok)" "$COLOR_OFF" "$(text "$@")"; }

verdict_warning() {
  DOCTOR_WARNINGS=$((DOCTOR_WARNINGS + 1))
  printf '%s[%s]%s %s\n' "$COLOR_YELLOW" "$(text doctor_warning)" "$COLOR_OFF" "$(text "$@")"
}

verdict_error() {
  DOCTOR_ERRORS=$((DOCTOR_ERRORS + 1))
  printf '%s[%s]%s %s\n' "$COLOR_RED" "$(text doctor_error)" "$COLOR_OFF" "$(text "$@")"
}

cmd_doctor() {
  (($# == 0)) || die 2 unknown_argument doctor "$1"
  if [[ ! -t 1 ]]; then COLOR_RED='' COLOR_GREEN='' COLOR_YELLOW='' COLOR_OFF=''; fi
  doctor_python
  doctor_vllm
  doctor_gpus
  layout
  doctor_layout
  doctor_ports
  doctor_model
  doctor_memory
  doctor_limits
  doctor_files
  doctor_running
  if ((DOCTOR_ERRORS)); then
    complain doctor_bad "$DOCTOR_ERRORS" "$DOCTOR_WARNINGS"
    return 1
  fi
  good doctor_good "$DOCTOR_WARNINGS"
}

doctor_python() {
  local missing
  find_base_python
  verdict_ok doc_python "$BASE_PYTHON" "$("$BASE_PYTHON" -V 2>&1)"
  missing=$(requirements_missing "$BASE_PYTHON")
  if [[ -z $missing ]]; then
    verdict_ok doc_packages "$BASE_PYTHON"
  elif venv_ready; then
    verdict_ok doc_packages "$VENV_DIR"
  elif "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    verdict_warning doc_packages_later "$missing" "$VENV_DIR"
  else
    verdict_error doc_no_venv "$missing" "$(venv_remedy)"
  fi
}

# Whether what vllm lacks is an error: only for those who asked for it, or have the GPUs.
wants_vllm() {
  read_gpus
  [[ $ENGINE == vllm || ($ENGINE == auto && ${#GPU_INDEXES[@]} -ge 2) ]]
}

doctor_vllm() {
  local bad=verdict_warning
  if wants_vllm; then bad=verdict_error; fi
  if [[ $ENGINE == sim ]]; then
    verdict_ok doc_sim_asked
  elif ! find_vllm; then
    if [[ $ENGINE == auto ]]; then bad=verdict_warning; fi
    "$bad" no_vllm
  elif ! vllm_usable; then
    "$bad" "${PROBLEM[@]}"
  else
    verdict_ok doc_vllm "$VLLM_VERSION" "$(connector_shown)" "${VLLM_COMMAND[*]}"
    if own_untried; then verdict_warning own_untried "$VLLM_VERSION"; fi
    if [[ $CONNECTOR == own ]]; then
      doctor_secret
    elif [[ $VLLM_RANDOMISES == yes ]]; then
      if [[ ${VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:-1} == 1 ]]; then verdict_ok doc_random_set; else verdict_warning doc_random_zero; fi
    else
      verdict_ok doc_random_none
    fi
    if chunks_may_kill; then verdict_warning chunked_warning "$MAX_NUM_BATCHED_TOKENS" "$MAX_MODEL_LEN"; fi
  fi
}

# On the loopback interface only this machine's users can come to the KV ports.
doctor_secret() {
  local host
  host=$(kv_host)
  if [[ -n $DISAGG_KV_SECRET ]]; then
    verdict_ok doc_secret
  elif ! is_loopback "$host"; then
    verdict_warning doc_no_secret "$host"
  fi
}

doctor_ports() {
  local name port taken
  for name in "${PARTS[@]}"; do
    taken=''
    if part_alive "$name"; then continue; fi
    for port in $(ports_of "$name"); do
      if port_taken "$port"; then
        verdict_error port_taken "$port" "$name" "$(port_holder "$port")"
        taken=1
      fi
    done
    if [[ -z $taken ]]; then verdict_ok doc_ports "$name" "$(ports_of "$name" | paste -sd ' ')"; fi
  done
}

doctor_model() {
  local file found='' bad=verdict_warning cache free
  if wants_vllm; then bad=verdict_error; fi
  if [[ $MODEL == /* || -e $MODEL ]]; then
    if [[ ! -d $MODEL || ! -r $MODEL/config.json ]]; then
      "$bad" doc_model_missing "$MODEL"
      return 0
    fi
    for file in tokenizer.json tokenizer.model vocab.json tekken.json; do
      if [[ -r $MODEL/$file ]]; then found=$file; fi
    done
    if [[ -z $found ]]; then "$bad" doc_no_tokenizer "$MODEL"; fi
    if ! compgen -G "$MODEL/*.safetensors" >/dev/null && ! compgen -G "$MODEL/*.bin" >/dev/null; then
      "$bad" doc_no_weights "$MODEL"
    elif [[ -n $found ]]; then
      verdict_ok doc_model "$MODEL" "$found"
    fi
    return 0
  fi
  if ! wants_vllm; then
    verdict_ok doc_model_unused "$MODEL"
    return 0
  fi
  cache=${HF_HUB_CACHE:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/hub}
  if compgen -G "$cache/models--${MODEL//\//--}/snapshots/*/config.json" >/dev/null; then
    verdict_ok doc_model_cached "$MODEL" "$cache"
  elif [[ ${HF_HUB_OFFLINE:-0} == 1 ]]; then
    verdict_error doc_model_offline "$MODEL" "$cache"
  else
    free=$(free_gib "$cache")
    if ((free < 20)); then verdict_error doc_model_disk "$MODEL" "$free" "$cache"; else verdict_warning doc_model_download "$MODEL" "$free" "$cache"; fi
  fi
}

# Free GiB where a path is, or would be.
free_gib() {
  local path=$1
  while [[ ! -d $path ]]; do path=$(dirname -- "$path"); done
  df -Pk -- "$path" | awk 'NR == 2 { print int($4 / 1048576) }'
}

# P2pNcclConnector's pinned pools: MEM_POOL_SIZE_GB, rounded up to a power of two, for each decode GPU, and 1 GiB for each prefill GPU.
doctor_memory() {
  local pool=1 need available free
  while ((pool < MEM_POOL_SIZE_GB)); do pool=$((pool * 2)); done
  need=$((TP_SIZE * (${#DECODES[@]} * pool + ${#PREFILLS[@]})))
  available=$(awk '$1 == "MemAvailable:" { print int($2 / 1048576) }' /proc/meminfo)
  if ! wants_vllm || [[ $CONNECTOR == own ]]; then
    :
  elif ((available < need)); then
    verdict_error doc_pool_big "$need" "$available"
  else
    verdict_ok doc_pool "$need" "$available"
  fi
  free=$(free_gib "$LOG_DIR")
  if ((free < 1)); then verdict_warning doc_log_disk "$LOG_DIR"; else verdict_ok doc_disk "$LOG_DIR" "$free"; fi
}

doctor_limits() {
  local files shm
  files=$(ulimit -n)
  if [[ $files != unlimited ]] && ((files < 4096)); then verdict_warning doc_files_low "$files"; else verdict_ok doc_files "$files"; fi
  if ((TP_SIZE > 1)); then
    shm=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')
    if ((${shm:-0} < 1024)); then verdict_warning doc_shm "${shm:-0}"; fi
  fi
}

# What earlier runs left in RUN_DIR.
doctor_files() {
  local name now stale=0
  printf -v now '%(%s)T' -1
  if [[ -d $RUN_DIR && ! -O $RUN_DIR ]]; then verdict_error dir_not_ours "$RUN_DIR"; fi
  for name in $(known_parts); do
    load_part "$name" || continue
    if [[ $PART_STATE == alive || $PART_PID == 0 ]]; then continue; fi
    stale=1
    verdict_warning "doc_stale_$PART_STATE" "$name" "$PART_PID" "$(((now - ${PART[since]:-now}) / 60))"
    if ((${PART[since]:-0} > now + 60)); then verdict_warning doc_clock "$name"; fi
  done
  if ((stale == 0)); then verdict_ok doc_run_dir "$RUN_DIR"; fi
}

# What runs, as `status` judges it.
doctor_running() {
  local name reason loading=''
  part_alive proxy || return 0
  ask_proxy
  for name in "${PREFILLS[@]}" "${DECODES[@]}" proxy; do
    part_alive "$name" || continue
    reason=${PROXY_WANTS[${PART[http]:-none}]:-}
    if [[ -n $reason ]]; then
      verdict_error doc_frozen "$name" "$reason" "$name"
    else
      readiness
      case $HEALTH in
        loading) loading=1 ;;
        hung) verdict_error doc_hung "$name" "$READINESS" "$name" ;;
      esac
    fi
  done
  if pair_is_missing "$loading"; then verdict_error doc_no_pair "$MISSING"; fi
}
