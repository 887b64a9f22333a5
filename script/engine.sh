# shellcheck shell=bash
# Which engines this machine can run: its GPUs, its vLLM, what that vLLM can do, and which KV connector it gets.

ENGINE_KIND=''  # vllm or sim, once resolve_engine has run
ENGINE_WHY=''   # why simulated, in words
VLLM_COMMAND=() # how to start vLLM's command line
VLLM_PYTHON=''  # its interpreter, when known
VLLM_VERSION='' # empty: none found
VLLM_CONNECTOR='' VLLM_RANDOMISES='' VLLM_SWITCH=''
CONNECTOR=p2p_nccl # or own, once vllm_usable has run; simulated engines speak p2p_nccl
# Minor versions of vLLM 0.x that disagg_kv/engine/versions.py accepts, and was tried with.
readonly OWN_OLDEST=21 OWN_NEWEST=33
GPUS_READ=''
GPU_INDEXES=()
declare -A GPU_NAME=() GPU_TOTAL_MIB=() GPU_FREE_MIB=() GPU_UUID=()

# GPUs as nvidia-smi numbers them; memory in MiB. None when there is no driver. CUDA_VISIBLE_DEVICES says which ones
# this user may use.
read_gpus() {
  local index uuid name total free
  [[ -z $GPUS_READ ]] || return 0
  GPUS_READ=1
  type -P nvidia-smi >/dev/null || return 0
  while IFS=, read -r index uuid name total free; do
    index=${index//[[:space:]]/}
    uuid=${uuid//[[:space:]]/}
    [[ $index =~ ^[0-9]+$ ]] && gpu_visible "$index" "$uuid" || continue
    GPU_INDEXES+=("$index")
    GPU_UUID[$index]=$uuid
    GPU_NAME[$index]=${name# }
    GPU_TOTAL_MIB[$index]=${total//[^0-9]/}
    GPU_FREE_MIB[$index]=${free//[^0-9]/}
  done < <(nvidia-smi --query-gpu=index,uuid,name,memory.total,memory.free --format=csv,noheader,nounits 2>/dev/null || true)
}

gpu_visible() {
  local entry
  [[ -v CUDA_VISIBLE_DEVICES ]] || return 0
  for entry in ${CUDA_VISIBLE_DEVICES//,/ }; do
    if [[ $entry == "$1" || ($entry == GPU-* && $2 == "$entry"*) ]]; then return 0; fi
  done
  return 1
}

# The index of a GPU that is named by index or UUID.
gpu_index() {
  local index
  for index in "${GPU_INDEXES[@]}"; do
    if [[ $1 == "$index" || ($1 == GPU-* && ${GPU_UUID[$index]} == "$1"*) ]]; then
      printf '%s' "$index"
      return 0
    fi
  done
  return 1
}

# PYTHON's own vLLM when PYTHON was given; else `vllm` on PATH, then the Pythons that are at hand.
find_vllm() {
  local program
  [[ -z $VLLM_VERSION ]] || return 0
  find_base_python
  if [[ ${SETTING_SOURCE[PYTHON]} != default ]] && vllm_of_python "$BASE_PYTHON"; then return 0; fi
  if program=$(type -P vllm); then
    VLLM_COMMAND=("$program")
    VLLM_PYTHON=$(interpreter_of "$program")
    if [[ -n $VLLM_PYTHON ]] && read_vllm_facts "$VLLM_PYTHON"; then return 0; fi
    if vllm_by_version "$program"; then return 0; fi
  fi
  if vllm_of_python "$BASE_PYTHON"; then return 0; fi
  if [[ -x $VENV_DIR/bin/python ]] && vllm_of_python "$VENV_DIR/bin/python"; then return 0; fi
  VLLM_COMMAND=()
  return 1
}

vllm_of_python() {
  read_vllm_facts "$1" || return 1
  VLLM_PYTHON=$1
  VLLM_COMMAND=("$1" -m vllm.entrypoints.cli.main)
}

read_vllm_facts() {
  local facts name value
  facts=$("$1" "$ROOT/script/vllm_facts.py" 2>/dev/null) || return 1
  while IFS='=' read -r name value; do
    case $name in
      version) VLLM_VERSION=$value ;;
      connector) VLLM_CONNECTOR=$value ;;
      randomises) VLLM_RANDOMISES=$value ;;
      switch) VLLM_SWITCH=$value ;;
    esac
  done <<<"$facts"
}

# A script's interpreter from its first lines; pip and uv write the `'''exec' "python"` form for long paths.
interpreter_of() {
  local first='' second='' found=''
  { IFS= read -r first && IFS= read -r second; } <"$1" 2>/dev/null || true
  if [[ $second =~ ^\'\'\'exec\'\ \"?([^\"]+python[0-9.]*)\"?\  ]]; then
    found=${BASH_REMATCH[1]}
  elif [[ $first =~ ^'#!'[[:space:]]*(/[^[:space:]]*python[0-9.]*)$ ]]; then
    found=${BASH_REMATCH[1]}
  elif [[ $first =~ ^'#!'[[:space:]]*/usr/bin/env\ +(python[0-9.]*)$ ]]; then
    found=$(type -P "${BASH_REMATCH[1]}") || true
  fi
  if [[ -x $found ]]; then printf '%s' "$found"; fi
}

# A vLLM whose files cannot be read: its own word, and what is known of that version.
vllm_by_version() {
  local words
  words=$(timeout 120 "$1" --version 2>/dev/null | tail -n 1) || return 1
  [[ ${words##* } =~ ^[0-9]+\.[0-9]+ ]] || return 1
  VLLM_VERSION=${words##* }
  VLLM_CONNECTOR=yes VLLM_RANDOMISES=no VLLM_SWITCH=no
  if vllm_at_least 0 24; then VLLM_CONNECTOR=no; fi
  if vllm_at_least 0 14; then VLLM_RANDOMISES=yes; fi
  if vllm_at_least 0 16; then VLLM_SWITCH=yes; fi
}

# vllm_at_least MAJOR MINOR
vllm_at_least() {
  [[ $VLLM_VERSION =~ ^([0-9]+)\.([0-9]+) ]] || return 0
  ((BASH_REMATCH[1] > $1 || (BASH_REMATCH[1] == $1 && BASH_REMATCH[2] >= $2)))
}

# vLLM's own connector as long as it is in tree, this project's from 0.24 on, unless KV_CONNECTOR says otherwise.
choose_connector() {
  CONNECTOR=$KV_CONNECTOR
  [[ $CONNECTOR == auto ]] || return 0
  CONNECTOR=p2p_nccl
  if vllm_at_least 0 24 || { [[ $VLLM_CONNECTOR != yes ]] && vllm_at_least 0 "$OWN_OLDEST"; }; then CONNECTOR=own; fi
}

connector_shown() {
  if [[ $CONNECTOR == own ]]; then text connector_own; else printf P2pNcclConnector; fi
}

# Chooses the connector. Why this vLLM cannot serve with it, as message words in PROBLEM; true when it can.
vllm_usable() {
  PROBLEM=()
  choose_connector
  if ! vllm_at_least 0 9 || [[ $VLLM_VERSION =~ ^0\.9\.[01]([^0-9]|$) ]]; then
    PROBLEM=(vllm_too_old "$VLLM_VERSION")
  elif [[ $CONNECTOR == own ]]; then
    if ! vllm_at_least 0 "$OWN_OLDEST"; then
      PROBLEM=(own_too_old "$VLLM_VERSION")
    elif ! is_ip "$(kv_host)"; then
      PROBLEM=(own_wants_ip "$ENGINE_HOST")
    else
      return 0
    fi
  elif [[ $VLLM_CONNECTOR != yes ]]; then
    PROBLEM=(vllm_no_connector "$VLLM_VERSION")
  elif [[ $VLLM_RANDOMISES == yes && $VLLM_SWITCH != yes ]]; then
    PROBLEM=(vllm_random_ids "$VLLM_VERSION")
  else
    return 0
  fi
  return 1
}

# A vLLM that is newer than what this project's connector was tried with.
own_untried() {
  [[ $CONNECTOR == own ]] && vllm_at_least 0 $((OWN_NEWEST + 1))
}

# The address under which this project's connector announces an engine; it resolves no names.
kv_host() {
  local host
  host=$(reach "$ENGINE_HOST")
  if [[ $host == localhost ]]; then host=127.0.0.1; fi
  printf '%s' "$host"
}

is_ip() {
  [[ $1 =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ || $1 == *:* ]]
}

is_loopback() {
  [[ $1 == 127.* || $1 == ::1 ]]
}

# Decides between vllm and sim. With ENGINE=vllm what lacks is an error; with auto two GPUs and an
# unusable vLLM are one too, since simulated engines are not what that user came for.
resolve_engine() {
  [[ -z $ENGINE_KIND ]] || return 0
  if [[ $ENGINE == sim ]]; then
    ENGINE_KIND=sim ENGINE_WHY=$(text why_asked)
    return 0
  fi
  read_gpus
  if ((${#GPU_INDEXES[@]} < 2)); then
    if [[ $ENGINE == vllm ]] && ! sharing_allowed; then die 1 too_few_gpus "${#GPU_INDEXES[@]}"; fi
    if [[ $ENGINE == auto ]]; then
      ENGINE_KIND=sim ENGINE_WHY=$(text why_gpus "${#GPU_INDEXES[@]}")
      return 0
    fi
  fi
  if ! find_vllm; then
    [[ $ENGINE == auto ]] || die 1 no_vllm
    ENGINE_KIND=sim ENGINE_WHY=$(text why_no_vllm)
    return 0
  fi
  vllm_usable || die 1 "${PROBLEM[@]}"
  ENGINE_KIND=vllm
}

sharing_allowed() {
  [[ $ALLOW_SHARED_GPU == 1 && ${#GPU_INDEXES[@]} -gt 0 ]]
}
