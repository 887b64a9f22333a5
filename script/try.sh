# shellcheck shell=bash
# `test` and `bench`: real requests through the proxy.

# The service that `test` and `bench` ask, or the end with exit code 3.
need_proxy() {
  find_base_python
  if ! proxy_get /health || [[ $HTTP_STATUS == 000 ]]; then
    die 3 no_proxy "http://$(authority "$HTTP_PROXY_HOST" "$HTTP_PROXY_PORT")"
  fi
  SERVICE_URL=http://$(authority "$HTTP_PROXY_HOST" "$HTTP_PROXY_PORT")
}

cmd_test() {
  local kind failed=0 model='' seconds first tokens engines answer
  (($# == 0)) || die 2 unknown_argument test "$1"
  need_proxy
  pass_keys
  served_names
  while IFS=$'\t' read -r kind model seconds first tokens engines answer; do
    case $kind in
      model) printf '%s\n' "$(text test_model "$model")" ;;
      problem)
        failed=1
        complain test_problem "$model" "$(plain_line "$seconds")"
        ;;
      skipped) warn test_skipped "$model" "$(plain_line "$seconds")" ;;
      answer)
        printf '%s%-10s%s %s\n' "$COLOR_BOLD" "$model" "$COLOR_OFF" "$(text test_times "$seconds" "$first" "$tokens" "$engines")"
        printf '           %s\n' "$(plain_line "$answer")"
        ;;
      end) failed=$((failed + model)) ;;
    esac
  done < <("$BASE_PYTHON" "$ROOT/script/check_service.py" "$SERVICE_URL" "${SERVED_NAMES[0]}" "$TEST_TIMEOUT" || printf 'end\t1\n')
  if ((failed)); then
    complain test_failed
    return 1
  fi
  good test_ok
}

# With vllm its own benchmark; without it a small load of this script's, which says nothing about GPUs.
cmd_bench() {
  local requests=$BENCH_REQUESTS kind=sim name
  (($# == 0)) || die 2 unknown_argument bench "$1"
  need_proxy
  pass_keys
  served_names
  for name in $(known_parts); do
    if load_part "$name" && [[ ${PART[kind]:-} == vllm ]]; then kind=vllm; fi
  done
  if [[ $kind == vllm ]] && find_vllm; then
    if [[ -n $API_KEY ]]; then export OPENAI_API_KEY=$API_KEY; fi
    no_proxy=127.0.0.1,localhost,::1 "${VLLM_COMMAND[@]}" bench serve --base-url "$SERVICE_URL" --endpoint /v1/completions \
      --model "${SERVED_NAMES[0]}" --tokenizer "$MODEL" --dataset-name random --random-input-len "$BENCH_INPUT_LEN" \
      --random-output-len "$BENCH_OUTPUT_LEN" --ignore-eos --num-prompts "${requests:-200}" --max-concurrency "$BENCH_CONCURRENCY"
  else
    warn bench_simulated
    "$BASE_PYTHON" "$ROOT/script/load.py" "$SERVICE_URL" "${SERVED_NAMES[0]}" "${requests:-60}" \
      "$BENCH_CONCURRENCY" "$BENCH_INPUT_LEN" "$BENCH_OUTPUT_LEN"
  fi
}
