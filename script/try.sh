# shellcheck shell=bash
# `test`: real requests through the proxy.

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
