# shellcheck shell=bash
# The parts of this machine: which engines, on which GPUs and ports. PARTS holds their names in the
# order of starting; one engine of a role is `prefill`, several are `prefill1`, `prefill2`, …

PARTS=()
PREFILLS=() DECODES=()
declare -A PART_ROLE=() PART_HTTP=() PART_KV=() PART_GPUS=()
TP_SIZE=1

layout() {
  local -A taken=()
  local role entry number count list
  ((${#PARTS[@]} == 0)) || return 0
  PARTS=(proxy)
  PART_ROLE[proxy]=proxy
  PART_HTTP[proxy]=$HTTP_PROXY_PORT
  claim HTTP_PROXY_PORT "$HTTP_PROXY_PORT"
  claim PROXY_PORT "$PROXY_PORT"
  for role in prefill decode; do
    if [[ $role == prefill ]]; then list=${PREFILL_GPUS:-$PREFILL_GPU}; else list=${DECODE_GPUS:-$DECODE_GPU}; fi
    local -a entries=()
    IFS=, read -ra entries <<<"$list"
    count=${#entries[@]} number=0
    for entry in "${entries[@]}"; do
      number=$((number + 1))
      if ((count == 1)); then add_engine "$role" "$role" "$entry"; else add_engine "$role" "$role$number" "$entry"; fi
    done
  done
  assign_ports
}

# add_engine ROLE NAME GPUS: TENSOR_PARALLEL widens a single GPU number to that many, counted up.
add_engine() {
  local role=$1 name=$2 gpus=$3 size offset
  local -a each
  if [[ $gpus != *+* ]] && ((TENSOR_PARALLEL > 1)); then
    [[ $gpus =~ ^[0-9]+$ ]] || die 2 gpu_not_countable "$gpus" "$TENSOR_PARALLEL"
    for ((offset = 1; offset < TENSOR_PARALLEL; offset++)); do gpus+="+$((${gpus%%+*} + offset))"; done
  fi
  IFS=+ read -ra each <<<"$gpus"
  size=${#each[@]}
  if ((TENSOR_PARALLEL > 1 && size != TENSOR_PARALLEL)); then die 2 gpu_count_differs "$gpus" "$TENSOR_PARALLEL"; fi
  if ((${#PREFILLS[@]} + ${#DECODES[@]} > 0 && size != TP_SIZE)); then die 2 unequal_parallel "$name"; fi
  TP_SIZE=$size
  PARTS+=("$name")
  PART_ROLE[$name]=$role
  PART_GPUS[$name]=${gpus//+/,}
  if [[ $role == prefill ]]; then PREFILLS+=("$name"); else DECODES+=("$name"); fi
}

claim() {
  if [[ -n ${taken[$2]:-} ]]; then die 2 port_twice "$2" "${taken[$2]}" "$1"; fi
  taken[$2]=$1
}

# The first engine of each role gets the ports that were asked for; further ones count up past what is taken.
assign_ports() {
  local name offset
  for name in "${PREFILLS[0]}" "${DECODES[0]}"; do
    if [[ ${PART_ROLE[$name]} == prefill ]]; then
      PART_HTTP[$name]=$PREFILL_HTTP_PORT PART_KV[$name]=$PREFILL_KV_PORT
    else
      PART_HTTP[$name]=$DECODE_HTTP_PORT PART_KV[$name]=$DECODE_KV_PORT
    fi
    claim "$name HTTP" "${PART_HTTP[$name]}"
    for ((offset = 0; offset < TP_SIZE; offset++)); do claim "$name KV" "$((PART_KV[$name] + offset))"; done
  done
  for name in "${PREFILLS[@]:1}" "${DECODES[@]:1}"; do
    if [[ ${PART_ROLE[$name]} == prefill ]]; then
      PART_HTTP[$name]=$(next_free "$PREFILL_HTTP_PORT" 1)
      claim "$name HTTP" "${PART_HTTP[$name]}"
      PART_KV[$name]=$(next_free "$PREFILL_KV_PORT" "$TP_SIZE")
    else
      PART_HTTP[$name]=$(next_free "$DECODE_HTTP_PORT" 1)
      claim "$name HTTP" "${PART_HTTP[$name]}"
      PART_KV[$name]=$(next_free "$DECODE_KV_PORT" "$TP_SIZE")
    fi
    for ((offset = 0; offset < TP_SIZE; offset++)); do claim "$name KV" "$((PART_KV[$name] + offset))"; done
  done
}

# next_free PORT WIDTH: the first port after PORT that begins WIDTH unclaimed ones.
next_free() {
  local port=$1 width=$2 offset
  while :; do
    port=$((port + 1))
    ((port + width <= 65536)) || die 2 ports_run_out "$1"
    for ((offset = 0; offset < width; offset++)); do
      if [[ -n ${taken[$((port + offset))]:-} ]]; then continue 2; fi
    done
    printf '%s' "$port"
    return 0
  done
}

# Every port NAME binds, one a line.
ports_of() {
  local offset
  printf '%s\n' "${PART_HTTP[$1]}"
  if [[ $1 == proxy ]]; then
    printf '%s\n' "$PROXY_PORT"
  elif [[ ${PART_ROLE[$1]} != plain ]]; then
    for ((offset = 0; offset < TP_SIZE; offset++)); do printf '%s\n' "$((PART_KV[$1] + offset))"; done
  fi
}

# For vllm: the GPUs exist, and no prefill shares one with a decode (NCCL refuses two ranks on one GPU).
check_gpus() {
  local name gpu index
  local -A role_of=()
  [[ $ENGINE_KIND == vllm ]] || return 0
  for name in "${PREFILLS[@]}" "${DECODES[@]}"; do
    for gpu in ${PART_GPUS[$name]//,/ }; do
      index=$(gpu_index "$gpu") || die 1 no_such_gpu "$gpu" "$name" "${GPU_INDEXES[*]}"
      if [[ -n ${role_of[$index]:-} && ${role_of[$index]} != "${PART_ROLE[$name]}" && $ALLOW_SHARED_GPU != 1 ]]; then
        die 1 gpu_shared "$index"
      fi
      role_of[$index]=${PART_ROLE[$name]}
    done
  done
}

# Whether two engines use the same GPU: vLLM measures free memory while it starts, so they must not start together.
share_gpu() {
  local gpu
  for gpu in ${PART_GPUS[$1]//,/ }; do
    if [[ ",${PART_GPUS[$2]}," == *",$gpu,"* ]]; then return 0; fi
  done
  return 1
}
