# shellcheck shell=bash
# The exact command and environment of every part. The vllm flags are those of vLLM 0.9.2 to 0.33
# (vllm/engine/arg_utils.py) and were run on two GPUs with 0.21.0.

LAUNCH_ENV=() # NAME=value words
LAUNCH=()     # the command

# compose NAME: LAUNCH_ENV and LAUNCH for one part.
compose() {
  LAUNCH_ENV=() LAUNCH=()
  if [[ $1 == proxy ]]; then
    compose_proxy
  elif [[ ${PART_ROLE[$1]} == plain ]]; then
    compose_plain "$1"
  elif [[ $ENGINE_KIND == vllm ]]; then
    compose_vllm "$1"
  else
    compose_sim "$1"
  fi
}

# Keys stay in the environment, where `ps` of other users does not show them.
compose_proxy() {
  split_words "$EXTRA_PROXY_ARGS"
  LAUNCH_ENV=("HTTP_PROXY_HOST=$HTTP_PROXY_HOST" "HTTP_PROXY_PORT=$HTTP_PROXY_PORT"
    "PROXY_HOST=$PROXY_HOST" "PROXY_PORT=$PROXY_PORT" "SHUTDOWN_GRACE=$(proxy_grace)"
    "DECODE_MAX_IN_FLIGHT=${DECODE_MAX_IN_FLIGHT:-$MAX_NUM_SEQS}")
  # This project's connector has no buffer that could fill.
  if [[ $CONNECTOR != own ]]; then
    LAUNCH_ENV+=("KV_BUFFER_BYTES=${KV_BUFFER_BYTES:-$(($(whole "$KV_BUFFER_SIZE") * TP_SIZE))}"
    "KV_BYTES_PER_TOKEN=${KV_BYTES_PER_TOKEN:-$(kv_bytes_per_token)}")
  fi
  LAUNCH=("$PROXY_PYTHON" "$ROOT/disagg_prefill_proxy_server.py" "${WORDS[@]}")
}

# With it the proxy lets no more prompts wait on a decode engine than its KV buffer holds; 0, when the model is not on
# this machine yet, leaves that out.
kv_bytes_per_token() {
  if [[ $ENGINE_KIND == sim ]]; then
    printf 147456
  else
    # Not PROXY_PYTHON: `env` prints the commands before the virtual environment is there.
    find_base_python
    "$BASE_PYTHON" "$ROOT/script/kv_bytes.py" "$MODEL" "$DTYPE"
  fi
}

# The proxy ends within SHUTDOWN_GRACE and a moment, which must fit into STOP_TIMEOUT.
proxy_grace() {
  printf '%s' "${SHUTDOWN_GRACE:-$((STOP_TIMEOUT > 3 ? STOP_TIMEOUT - 3 : 1))}"
}

# Names a client may use; the first is shown in examples.
served_names() {
  if [[ -n $SERVED_MODEL_NAME ]]; then
    IFS=, read -ra SERVED_NAMES <<<"$SERVED_MODEL_NAME"
  else
    local last=${MODEL%/}
    last=${last##*/}
    SERVED_NAMES=("$last")
    if [[ $last != "$MODEL" ]]; then SERVED_NAMES+=("$MODEL"); fi
  fi
}

compose_sim() {
  local name=$1 model more=()
  served_names
  for model in "${SERVED_NAMES[@]}"; do more+=(--model "$model"); done
  if [[ -n $ENGINE_API_KEY ]]; then more+=(--api-key "$ENGINE_API_KEY"); fi
  split_words "$EXTRA_SIM_ARGS"
  LAUNCH=("$PROXY_PYTHON" -m disagg_sim --role "${PART_ROLE[$name]}" --host "$ENGINE_HOST"
    --port "${PART_HTTP[$name]}" --kv-port "${PART_KV[$name]}" --proxy "$(authority "$PROXY_HOST" "$PROXY_PORT")"
    --max-model-len "$MAX_MODEL_LEN" --max-num-seqs "$MAX_NUM_SEQS" --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS"
    --kv-buffer-bytes "$(whole "$KV_BUFFER_SIZE")" --kv-pool-bytes "$((MEM_POOL_SIZE_GB << 30))"
    "${more[@]}" "${WORDS[@]}")
}

# An engine by itself, which `bench` compares with: vLLM's defaults where no setting says otherwise.
compose_plain() {
  local name=$1 gpus model
  served_names
  split_words "$EXTRA_PLAIN_ARGS"
  if [[ $ENGINE_KIND == sim ]]; then
    LAUNCH=("$PROXY_PYTHON" -m disagg_sim --role decode --connector disagg_kv --host "$ENGINE_HOST"
      --port "${PART_HTTP[$name]}" --kv-port 0 --max-model-len "$MAX_MODEL_LEN" --max-num-seqs "$MAX_NUM_SEQS"
      --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS")
    for model in "${SERVED_NAMES[@]}"; do LAUNCH+=(--model "$model"); done
    if [[ -n $ENGINE_API_KEY ]]; then LAUNCH+=(--api-key "$ENGINE_API_KEY"); fi
    LAUNCH+=("${WORDS[@]}")
    split_words "$EXTRA_SIM_ARGS"
  else
    gpus=${PART_GPUS[$name]//[!,]/}
    LAUNCH_ENV=(CUDA_DEVICE_ORDER=PCI_BUS_ID "CUDA_VISIBLE_DEVICES=${PART_GPUS[$name]}" "VLLM_HOST_IP=$ENGINE_HOST")
    if [[ -z ${VLLM_PORT:-} ]]; then
      # vLLM looks for free ports of its own and takes them a moment later; engines that start together found the same
      # one (0.21, seen on two GPUs). From here it counts up.
      LAUNCH_ENV+=("VLLM_PORT=$((41000 + 64 * (PART_HTTP[$name] - PREFILL_HTTP_PORT)))")
    fi
    LAUNCH=("${VLLM_COMMAND[@]}" serve "$MODEL" --host "$ENGINE_HOST" --port "${PART_HTTP[$name]}"
      --served-model-name "${SERVED_NAMES[@]}" --dtype "$DTYPE" --max-model-len "$MAX_MODEL_LEN"
      --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" --max-num-seqs "$MAX_NUM_SEQS"
      --gpu-memory-utilization "$PREFILL_GPU_MEMORY_UTILIZATION")
    if [[ -n $gpus ]]; then LAUNCH+=(--tensor-parallel-size $((${#gpus} + 1))); fi
    if [[ $ENFORCE_EAGER == 1 ]]; then LAUNCH+=(--enforce-eager); fi
    if ! vllm_at_least 0 10; then LAUNCH+=(--disable-log-requests); fi
  fi
  LAUNCH+=("${WORDS[@]}")
}

compose_vllm() {
  local name=$1 role extra
  role=${PART_ROLE[$name]}
  served_names
  if [[ $role == prefill ]]; then extra=$EXTRA_PREFILL_ARGS; else extra=$EXTRA_DECODE_ARGS; fi
  split_words "$extra"
  # CUDA numbers GPUs by speed unless told to number them as nvidia-smi does.
  LAUNCH_ENV=(CUDA_DEVICE_ORDER=PCI_BUS_ID "CUDA_VISIBLE_DEVICES=${PART_GPUS[$name]}")
  if [[ $CONNECTOR == own ]]; then
    LAUNCH_ENV+=("VLLM_HOST_IP=$(kv_host)" "PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
  else
    LAUNCH_ENV+=("VLLM_HOST_IP=$ENGINE_HOST" VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1)
    if ! vllm_at_least 0 11; then LAUNCH_ENV+=(VLLM_USE_V1=1); fi
  fi
  LAUNCH=("${VLLM_COMMAND[@]}" serve "$MODEL" --host "$ENGINE_HOST" --port "${PART_HTTP[$name]}"
    --served-model-name "${SERVED_NAMES[@]}" --dtype "$DTYPE" --max-model-len "$MAX_MODEL_LEN"
    --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" --max-num-seqs "$MAX_NUM_SEQS"
    --gpu-memory-utilization "$(memory_share "$role")")
  if ((TP_SIZE > 1)); then LAUNCH+=(--tensor-parallel-size "$TP_SIZE"); fi
  if eager "$role"; then
    LAUNCH+=(--enforce-eager)
  elif [[ $CONNECTOR != own && $role == prefill ]] && vllm_at_least 0 11; then
    # The connector sends KV from inside the forward pass (save_kv_layer). A step that is replayed as one full graph
    # would skip it, and the connector does not ask for piecewise graphs itself.
    LAUNCH+=(--compilation-config '{"cudagraph_mode":"PIECEWISE"}')
  fi
  if ! vllm_at_least 0 10; then LAUNCH+=(--disable-log-requests); fi
  if [[ $role == prefill ]]; then
    if ! chunked_prefill; then LAUNCH+=(--no-enable-chunked-prefill); fi
  elif [[ $CONNECTOR != own ]]; then
    # A cached prefix that covers the prompt leaves the KV that was sent for it counted in the buffer for ever
    # (p2p_nccl_connector.py asks for no load, get_finished gives nothing back), and decode computes no prefill.
    LAUNCH+=(--no-enable-prefix-caching)
  fi
  LAUNCH+=(--kv-transfer-config "$(transfer_config "$name")" "${WORDS[@]}")
}

# memory_share ROLE: only P2pNcclConnector keeps a buffer for arrived KV beside what vLLM takes.
memory_share() {
  if [[ $1 == prefill ]]; then
    printf '%s' "$PREFILL_GPU_MEMORY_UTILIZATION"
  elif [[ -z $DECODE_GPU_MEMORY_UTILIZATION && $CONNECTOR == own ]]; then
    printf 0.9
  else
    printf '%s' "${DECODE_GPU_MEMORY_UTILIZATION:-0.7}"
  fi
}

# eager ROLE: whether it runs without CUDA graphs. This project's connector sends after the step, so graphs cost nothing.
eager() {
  case $ENFORCE_EAGER in
    auto) [[ $CONNECTOR != own ]] ;;
    prefill) [[ $1 == prefill ]] ;;
    *) [[ $ENFORCE_EAGER == 1 ]] ;;
  esac
}

# P2pNcclConnector asserts that every further chunk brings new blocks (build_connector_meta, from 0.11 on), which is
# false for a chunk that ends inside the last block: the prefill engine dies. Whole prompts cannot meet it.
# Before 0.14 the V1 engine chunks whatever the flag says.
chunked_prefill() {
  if [[ $CONNECTOR == own ]]; then
    [[ $CHUNKED_PREFILL != off ]]
    return
  fi
  case $CHUNKED_PREFILL in
    on) return 0 ;;
    off) vllm_at_least 0 14 || return 0 ;;
    auto) vllm_at_least 0 14 && ((MAX_NUM_BATCHED_TOKENS >= MAX_MODEL_LEN)) || return 0 ;;
  esac
  return 1
}

chunks_may_kill() {
  [[ $CONNECTOR != own ]] && chunked_prefill && vllm_at_least 0 11
}

transfer_config() {
  if [[ $CONNECTOR == own ]]; then own_config "$1"; else p2p_config "$1"; fi
}

# docs/connector.md. The connector listens and fetches on the loopback interface unless told otherwise.
own_config() {
  local role=kv_producer policy='' host more=''
  host=$(kv_host)
  if [[ ${PART_ROLE[$1]} == decode ]]; then role=kv_consumer policy='"kv_load_failure_policy":"recompute",'; fi
  if [[ $host != 127.0.0.1 ]]; then more+=",\"listen\":\"$host\""; fi
  if ! is_loopback "$host"; then more+=",\"peers\":\"$host\""; fi
  printf '{"kv_connector":"DisaggKVConnector","kv_connector_module_path":"disagg_kv.connector","kv_role":"%s","kv_port":%s,' \
    "$role" "${PART_KV[$1]}"
  printf '%s"kv_connector_extra_config":{"proxy_ip":"%s","proxy_port":%s,"http_port":%s%s}}' \
    "$policy" "$(reach "$PROXY_HOST")" "$PROXY_PORT" "${PART_HTTP[$1]}" "$more"
}

# A prefill engine receives nothing, so it needs neither buffer nor pool; vLLM wants a number all the same.
p2p_config() {
  local role=kv_producer buffer=1e1 pool=1
  if [[ ${PART_ROLE[$1]} == decode ]]; then role=kv_consumer buffer=$KV_BUFFER_SIZE pool=$MEM_POOL_SIZE_GB; fi
  printf '{"kv_connector":"P2pNcclConnector","kv_role":"%s","kv_buffer_size":"%s","kv_port":"%s",' \
    "$role" "$buffer" "${PART_KV[$1]}"
  printf '"kv_connector_extra_config":{"proxy_ip":"%s","proxy_port":"%s","http_port":"%s",' \
    "$(proxy_ip)" "$PROXY_PORT" "${PART_HTTP[$1]}"
  printf '"send_type":"PUT_ASYNC","nccl_num_channels":"16","mem_pool_size_gb":"%s"}}' "$pool"
}

# P2pNcclConnector puts "tcp://" before and ":port" behind it.
proxy_ip() {
  local host
  host=$(reach "$PROXY_HOST")
  if [[ $host == *:* && $host != '['* ]]; then host="[$host]"; fi
  printf '%s' "$host"
}

# The command as a person would type it.
launch_line() {
  local word
  compose "$1"
  for word in "${LAUNCH_ENV[@]}"; do printf '%s=%s ' "${word%%=*}" "$(shell_quote "${word#*=}")"; done
  for word in "${LAUNCH[@]}"; do printf '%s ' "$(shell_quote "$word")"; done
  printf '\n'
}

shell_quote() {
  if [[ $1 =~ ^[A-Za-z0-9_./:,+=@%-]+$ ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/\'\\\'\'}"; fi
}

# launch NAME LOG: checks nothing, starts it, leaves its PID in SPAWNED. The PID file keeps how many requests
# the proxy had sent to this address before, and an engine's connector.
launch() {
  local name=$1 log=$2 mode=background
  local direct=${no_proxy:-${NO_PROXY:-}}
  # A proxy for the internet, which a download may need, must not get what stays on this machine.
  direct=${direct:+$direct,}127.0.0.1,localhost,::1,$ENGINE_HOST
  local -a environment=(env "no_proxy=$direct" "NO_PROXY=$direct")
  compose "$name"
  environment+=("${LAUNCH_ENV[@]}")
  if [[ $name == proxy || $ENGINE_KIND == sim ]]; then environment+=(PYTHONUNBUFFERED=1); fi
  if [[ $log == - ]]; then mode=foreground; fi
  SPAWN_FIELDS=("kind=$(kind_of "$name")" "role=${PART_ROLE[$name]}" "mode=$mode" "http=${PART_HTTP[$name]}"
  "kv=${PART_KV[$name]:-$PROXY_PORT}" "gpus=${PART_GPUS[$name]:-}" "served=${PROXY_COUNT[${PART_HTTP[$name]}]:-0}")
  if [[ ${PART_ROLE[$name]} != proxy && ${PART_ROLE[$name]} != plain ]]; then SPAWN_FIELDS+=("connector=$CONNECTOR"); fi
  pass_keys
  spawn "$name" "$log" "${environment[@]}" "${LAUNCH[@]}"
}

# Keys go through the exported environment, not through arguments that `ps` shows; vLLM reads VLLM_API_KEY.
pass_keys() {
  if [[ -n $API_KEY ]]; then export API_KEY; fi
  if [[ -n $DISAGG_KV_SECRET ]]; then export DISAGG_KV_SECRET; fi
  if [[ -n $ENGINE_API_KEY ]]; then
    VLLM_API_KEY=$ENGINE_API_KEY
    export ENGINE_API_KEY VLLM_API_KEY
  fi
}

kind_of() {
  if [[ $1 == proxy ]]; then printf proxy; else printf '%s' "$ENGINE_KIND"; fi
}
