# shellcheck shell=bash
# `doctor` on GPUs: they exist, what the engines will take of them is free, and how they are connected.

doctor_gpus() {
  local index
  read_gpus
  if ((${#GPU_INDEXES[@]} < 2)); then
    if [[ $ENGINE == vllm ]]; then verdict_error too_few_gpus "${#GPU_INDEXES[@]}"; else verdict_warning doc_few_gpus "${#GPU_INDEXES[@]}"; fi
  fi
  for index in "${GPU_INDEXES[@]}"; do
    verdict_ok doc_gpu "$index" "${GPU_NAME[$index]}" "${GPU_FREE_MIB[$index]}" "${GPU_TOTAL_MIB[$index]}"
  done
}

# Per engine: the GPUs exist, and what it will take is free. Per pair: the way between the two.
doctor_layout() {
  local name other gpu index share want
  local -A role_of=() shares=()
  if ((${#GPU_INDEXES[@]} == 0)) || [[ $ENGINE == sim ]]; then return 0; fi
  for name in "${PREFILLS[@]}" "${DECODES[@]}"; do
    for gpu in ${PART_GPUS[$name]//,/ }; do
      if ! index=$(gpu_index "$gpu"); then
        verdict_error no_such_gpu "$gpu" "$name" "${GPU_INDEXES[*]}"
        continue
      fi
      if [[ -n ${role_of[$index]:-} && ${role_of[$index]} != "${PART_ROLE[$name]}" ]]; then verdict_error gpu_shared "$index"; fi
      role_of[$index]=${PART_ROLE[$name]}
      share=$(memory_share "${PART_ROLE[$name]}")
      shares[$index]=$((${shares[$index]:-0} + $(thousandth "$share")))
      want=$((GPU_TOTAL_MIB[$index] * shares[$index] / 1000))
      if ((shares[$index] > 1000)); then
        verdict_error doc_gpu_over "$index" "$((shares[$index] / 10))"
      elif part_alive "$name"; then
        verdict_ok part_runs "$name" "$PART_PID"
      elif ((GPU_FREE_MIB[$index] < want)); then
        verdict_error doc_gpu_busy "$index" "${GPU_FREE_MIB[$index]}" "$want" "$name"
      else
        verdict_ok doc_gpu_free "$index" "${GPU_FREE_MIB[$index]}" "$want" "$name"
      fi
      if [[ $CONNECTOR == own ]]; then
        doctor_staging "$index" "$want" "$name"
      elif [[ ${PART_ROLE[$name]} == decode ]]; then
        doctor_buffer "$index" "$want" "$name"
      fi
    done
  done
  for name in "${PREFILLS[@]}"; do
    for other in "${DECODES[@]}"; do doctor_link "${PART_GPUS[$name]%%,*}" "${PART_GPUS[$other]%%,*}" "$name" "$other"; done
  done
}

# 0.7 as 700.
thousandth() {
  whole "${1}e3"
}

# The KV buffer lies outside of vLLM's share of the GPU; NCCL and CUDA want about 1 GiB beside it.
doctor_buffer() {
  local left=$((GPU_TOTAL_MIB[$1] - $2)) need
  need=$(($(whole "$KV_BUFFER_SIZE") / 1048576 + 1024))
  if ((left < need)); then
    verdict_error doc_buffer_big "$3" "$1" "$left" "$need"
  else
    verdict_ok doc_buffer "$3" "$1" "$left" "$need"
  fi
}

# This project's connector: three staging buffers of 64 MiB for each engine of the other role, beside NCCL and CUDA.
doctor_staging() {
  local left=$((GPU_TOTAL_MIB[$1] - $2)) peers=${#PREFILLS[@]} need
  if [[ ${PART_ROLE[$3]} == prefill ]]; then peers=${#DECODES[@]}; fi
  need=$((3 * 64 * peers + 1024))
  if ((left < need)); then
    verdict_warning doc_staging_big "$3" "$1" "$left" "$need"
  else
    verdict_ok doc_staging "$3" "$1" "$left" "$need"
  fi
}

# nvidia-smi's matrices name rows and columns GPU0, GPU1, …; the entry says how the two are connected.
matrix_entry() {
  local kind=$1 row=GPU$2 column=GPU$3 words=() position=-1 index line
  while IFS= read -r line; do
    read -ra words <<<"$(plain_line "${line//$'\e[4m'/}")"
    if ((${#words[@]} == 0)); then continue; fi
    if ((position < 0)); then
      for index in "${!words[@]}"; do
        if [[ ${words[index]} == "$column" ]]; then position=$index; fi
      done
    elif [[ ${words[0]} == "$row" ]]; then
      printf '%s' "${words[position + 1]:-}"
      return 0
    fi
  done < <(nvidia-smi topo $kind 2>/dev/null | sed 's/\x1b\[[0-9;]*m//g')
  return 1
}

doctor_link() {
  local from to link peer
  from=$(gpu_index "$1") && to=$(gpu_index "$2") && [[ $from != "$to" ]] || return 0
  link=$(matrix_entry -m "$from" "$to") || link=''
  peer=$(matrix_entry '-p2p r' "$from" "$to") || peer=''
  case $link in
    NV*) verdict_ok doc_link_nvlink "$3" "$4" "$link" ;;
    PIX | PXB | PHB | NODE | SYS) verdict_warning doc_link_pci "$3" "$4" "$link" ;;
    *) verdict_warning doc_link_unknown "$3" "$4" ;;
  esac
  case $peer in
    OK) verdict_ok doc_peer "$3" "$4" ;;
    '') ;;
    *) verdict_warning doc_no_peer "$3" "$4" "$peer" ;;
  esac
}
