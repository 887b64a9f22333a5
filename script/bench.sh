# shellcheck shell=bash
# `bench`: a report over request rates (disagg_report/), of what runs, of plain engines on the same GPUs beside it, or of
# each split of the GPUs into prefill and decode. `bench --once` is one load without a report.

BENCH_FOLDER='' BENCH_KIND='' BENCH_GENERATOR=''
BENCH_KEY=''       # of what is measured
BENCH_MEASURING='' # PID of the measurement

cmd_bench() {
  local once='' ratio='' plain=''
  while (($#)); do
    case $1 in
      --once) once=1 ;;
      --ratio) ratio=1 ;;
      --against-plain) plain=1 ;;
      *) die 2 unknown_argument bench "$1" ;;
    esac
    shift
  done
  if [[ -n $once && -n $ratio$plain ]]; then die 2 bench_once_alone; fi
  if [[ -n $once ]]; then
    bench_once
  elif [[ -n $ratio$plain ]]; then
    bench_setups "$ratio" "$plain"
  else
    bench_running
  fi
}

# Whether what runs are vLLM's engines, in BENCH_KIND: vllm or sim.
bench_kind() {
  local name
  BENCH_KIND=sim
  for name in $(known_parts); do
    if load_part "$name" && [[ ${PART[kind]:-} == vllm ]]; then BENCH_KIND=vllm; fi
  done
}

# With vllm its own benchmark; without it a small load of this script's, which says nothing about GPUs.
bench_once() {
  need_proxy
  pass_keys
  served_names
  bench_kind
  if [[ $BENCH_KIND == vllm ]] && find_vllm; then
    if [[ -n $API_KEY ]]; then export OPENAI_API_KEY=$API_KEY; fi
    no_proxy=127.0.0.1,localhost,::1 "${VLLM_COMMAND[@]}" bench serve --base-url "$SERVICE_URL" --endpoint /v1/completions \
      --model "${SERVED_NAMES[0]}" --tokenizer "$MODEL" --dataset-name random --random-input-len "$BENCH_INPUT_LEN" \
      --random-output-len "$BENCH_OUTPUT_LEN" --ignore-eos --num-prompts "${BENCH_REQUESTS:-200}" \
      --max-concurrency "$BENCH_CONCURRENCY"
  else
    warn bench_simulated
    "$BASE_PYTHON" "$ROOT/script/load.py" "$SERVICE_URL" "${SERVED_NAMES[0]}" "${BENCH_REQUESTS:-60}" \
      "$BENCH_CONCURRENCY" "$BENCH_INPUT_LEN" "$BENCH_OUTPUT_LEN"
  fi
}

# The report of what runs now, however it was started.
bench_running() {
  local prefills decodes title
  need_proxy
  bench_kind
  prefills=$(ready_of prefill) decodes=$(ready_of decode)
  ((prefills > 0 && decodes > 0)) || die 1 bench_no_pair "$SERVICE_URL"
  title=$(pd_title "$prefills" "$decodes")
  bench_begin
  trap 'bench_end $?' EXIT
  trap 'bench_signal 130' INT
  trap 'bench_signal 143' TERM HUP
  measure pd "$title" pd sweep $((prefills + decodes)) $((prefills * decodes)) "$SERVICE_URL"
}

# Ready engines of a role, as the proxy's /health (HTTP_BODY) counts them.
ready_of() {
  if [[ $HTTP_BODY =~ \"$1\":\ *\{[^}]*\"ready\":\ *([0-9]+) ]]; then printf '%s' "${BASH_REMATCH[1]}"; else printf 0; fi
}

pd_title() {
  printf '%s prefill + %s decode' "$1" "$2"
}

# The Python that has the report's packages, the load generator, and the folder.
bench_begin() {
  ensure_python
  if ((BENCH_INPUT_LEN + BENCH_OUTPUT_LEN > MAX_MODEL_LEN)); then
    die 2 bench_too_long "$BENCH_INPUT_LEN" "$BENCH_OUTPUT_LEN" "$MAX_MODEL_LEN"
  fi
  BENCH_GENERATOR=own
  if [[ $BENCH_CLIENT != own ]]; then
    if find_vllm && [[ $BENCH_KIND == vllm || $BENCH_CLIENT == vllm ]]; then
      BENCH_GENERATOR=vllm
    elif [[ $BENCH_CLIENT == vllm ]]; then
      die 1 no_vllm
    fi
  fi
  if [[ $BENCH_KIND == sim ]]; then
    loud "$(text bench_sim_figures)"
  elif [[ $BENCH_GENERATOR == own ]]; then
    warn bench_own_client
  fi
  served_names
  BENCH_KEY=$API_KEY
  BENCH_FOLDER=$REPORT_DIR/$(printf '%(%Y-%m-%d_%H-%M-%S)T' -1)
  mkdir -p -- "$BENCH_FOLDER" 2>/dev/null || die 1 cannot_make_dir "$BENCH_FOLDER"
  say bench_folder "$BENCH_FOLDER"
}

# measure NAME TITLE KIND QUESTION ENGINES PAIRS URL...: one setup into the report. Ends the script as the sweep ended.
measure() {
  local name=$1 title=$2 kind=$3 question=$4 engines=$5 pairs=$6 url seconds limit part role status=0
  local -a words=() program=()
  local -A gpus=()
  shift 6
  seconds=10 limit=180
  if [[ $BENCH_KIND == vllm ]]; then seconds=30 limit=900; fi
  words=(sweep "$BENCH_FOLDER" --name "$name" --title "$title" --kind "$kind" --question "$question"
    --engines "$engines" --model "${SERVED_NAMES[0]}" --tokenizer "$MODEL" --client "$BENCH_GENERATOR" --rates "$BENCH_RATES"
    --seconds "${BENCH_SECONDS:-$seconds}" --time-limit "${BENCH_TIME_LIMIT:-$limit}" --warm-up $((4 * pairs + 4))
    --slo-ttft-ms "$BENCH_SLO_TTFT_MS" --slo-tpot-ms "$BENCH_SLO_TPOT_MS" --slo-attainment "$BENCH_SLO_ATTAINMENT"
    --input-len "$BENCH_INPUT_LEN" --output-len "$BENCH_OUTPUT_LEN")
  for url in "$@"; do words+=(--url "$url"); done
  if [[ $BENCH_KIND == sim ]]; then words+=(--simulated); fi
  if [[ $BENCH_GENERATOR == vllm ]]; then
    for part in "${VLLM_COMMAND[@]}"; do program+=("$(shell_quote "$part")"); done
    words+=(--vllm "${program[*]}" --vllm-version "$VLLM_VERSION")
  fi
  for part in $(known_parts); do
    if load_part "$part" && [[ ${PART[kind]:-} == vllm && -n ${PART[gpus]:-} ]]; then
      role=${PART[role]}
      gpus[$role]+=${gpus[$role]:+,}${PART[gpus]}
    fi
  done
  for role in "${!gpus[@]}"; do words+=(--gpus "$role=${gpus[$role]}"); done
  while IFS= read -r url; do words+=(--fact "$url"); done < <(bench_facts)
  # In the background and awaited, so that a signal to this script alone ends it, too.
  (cd -- "$ROOT" && BENCH_KEY=$BENCH_KEY exec "$PROXY_PYTHON" -m disagg_report "${words[@]}") &
  BENCH_MEASURING=$!
  wait "$BENCH_MEASURING" || status=$?
  BENCH_MEASURING=''
  if ((status)); then exit "$status"; fi
}

# NAME=VALUE of what the figures depend on.
bench_facts() {
  local name
  if [[ $BENCH_KIND == vllm ]]; then
    if find_vllm; then printf 'vLLM=%s\n' "$VLLM_VERSION"; fi
    for name in $(known_parts); do
      if load_part "$name" && [[ -n ${PART[connector]:-} ]]; then printf 'KV connector=%s\n' "${PART[connector]}"; fi
    done | sort -u | head -n 1
    for name in MODEL DTYPE TENSOR_PARALLEL MAX_MODEL_LEN MAX_NUM_BATCHED_TOKENS MAX_NUM_SEQS ENFORCE_EAGER EXTRA_PREFILL_ARGS \
      EXTRA_DECODE_ARGS EXTRA_PLAIN_ARGS; do
      if [[ -n ${!name} ]]; then printf '%s=%s\n' "$name" "${!name}"; fi
    done
  else
    printf 'Engines=SIMULATED\n'
    if [[ -n $EXTRA_SIM_ARGS ]]; then printf 'EXTRA_SIM_ARGS=%s\n' "$EXTRA_SIM_ARGS"; fi
  fi
  if [[ -n $EXTRA_PROXY_ARGS ]]; then printf 'EXTRA_PROXY_ARGS=%s\n' "$EXTRA_PROXY_ARGS"; fi
}

# bench_signal STATUS: the measurement writes down what it has, then everything ends as it would.
bench_signal() {
  if [[ -n $BENCH_MEASURING ]]; then
    kill -TERM "$BENCH_MEASURING" 2>/dev/null || true
    while read_stat "$BENCH_MEASURING" && [[ $STAT_STATE != [ZX] ]]; do sleep 0.05; done
  fi
  exit "$1"
}

# bench_end STATUS: the summary of whatever was measured, however it ended.
bench_end() {
  local status=$1
  trap - EXIT
  bench_write || status=$((status ? status : 1))
  exit "$status"
}

bench_write() {
  if [[ -z $(compgen -G "$BENCH_FOLDER/setups/*/rate-*.json" || true) ]]; then
    complain bench_nothing "$BENCH_FOLDER"
    return 1
  fi
  (cd -- "$ROOT" && exec "$PROXY_PYTHON" -m disagg_report write "$BENCH_FOLDER")
}
