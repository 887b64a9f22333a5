# shellcheck shell=bash
# The commands: their table, the help made from it, the foreground ones, and the way in.

# command|arguments|message key
COMMANDS_TABLE='menu||help_menu
proxy||help_proxy
prefill|[N]|help_prefill
decode|[N]|help_decode
all|[--supervise,--no-supervise]|help_all
test||help_test
status||help_status
logs|[NAME...] [-f] [-n LINES]|help_logs
stop|[NAME...]|help_stop
restart|NAME...|help_restart
config|[--markdown [en,zh]]|help_config
doctor||help_doctor
bench|[--ratio] [--against-plain] [--once]|help_bench
env||help_env
page||help_page
top|[--once]|help_top
help||help_help'

cmd_help() {
  local command arguments key name
  text usage "${0##*/}"
  printf '\n\n%s\n' "$(text help_commands)"
  while IFS='|' read -r command arguments key; do
    printf '  %-38s %s\n' "$command ${arguments//,/|}" "$(text "$key")"
  done <<<"$COMMANDS_TABLE"
  printf '\n%s\n' "$(text help_settings)"
  for name in "${SETTING_NAMES[@]}"; do
    if [[ ${SETTING_DEFAULT[$name]} == @ || -z ${SETTING_DEFAULT[$name]} ]]; then
      printf '  %s\n      %s\n' "$name" "${SETTING_HELP[$name]}"
    else
      printf '  %s=%s\n      %s\n' "$name" "${SETTING_DEFAULT[$name]}" "${SETTING_HELP[$name]}"
    fi
  done
  printf '\n%s\n%s\n' "$(text help_exit_codes)" "$(text help_completion "$ROOT/completions/test_single_machine.bash")"
}

# proxy, prefill [N], decode [N]: in the foreground; Ctrl+C stops them with their children.
cmd_foreground() {
  local role=$1 number=${2:-} name
  [[ $number =~ ^([1-9][0-9]?)?$ && $# -le 2 ]] || die 2 unknown_argument "$role" "${3:-$number}"
  lock_for "$role"
  ensure_python
  if [[ $role != proxy ]]; then resolve_engine; else ENGINE_KIND=${ENGINE_KIND:-sim}; fi
  layout
  name=$(part_of "$role" "${number:-1}") || die 2 no_such_part "$role $number" "${PARTS[*]}"
  if part_alive "$name"; then die 1 part_runs "$name" "$PART_PID"; fi
  if [[ $role != proxy ]]; then
    check_gpus
    if [[ $ENGINE_KIND == sim ]]; then loud "$(text loud_sim)" "$(text loud_why "$ENGINE_WHY")" "$(text loud_sim_how)"; fi
    if [[ -z $number && $name == *1 ]]; then say foreground_first "$name" "$role"; fi
  fi
  check_ports "$name"
  sweep "$name"
  say foreground "$name" "$(ports_of "$name" | paste -sd ' ')"
  trap 'foreground_stop 130' INT
  trap 'foreground_stop 143' TERM HUP
  FOREGROUND=$name
  launch "$name" -
  release_lock
  local status=0
  wait "$SPAWNED" 2>/dev/null || status=$?
  # A part that ended by itself may have left children.
  stop_parts 5 "$name"
  if ((status)); then die 1 part_ended "$name" "$status"; fi
}

foreground_stop() {
  local status=$1
  # A second Ctrl+C does not wait.
  trap 'signal_group KILL "$SPAWNED"' INT TERM HUP
  say stopping "$FOREGROUND"
  stop_parts "$STOP_TIMEOUT" "$FOREGROUND"
  release_lock
  exit "$status"
}

part_of() {
  local -a names=()
  case $1 in
    proxy) names=(proxy) ;;
    prefill) names=("${PREFILLS[@]}") ;;
    decode) names=("${DECODES[@]}") ;;
  esac
  [[ -n ${names[$2 - 1]:-} ]] || return 1
  printf '%s' "${names[$2 - 1]}"
}

main() {
  local command=${1:-}
  ui_init
  settings_init
  if [[ ! -r /proc/self/stat ]]; then die 1 no_proc; fi
  if [[ -z $command ]]; then
    if [[ ! -t 0 ]]; then
      text usage "${0##*/}" >&2
      printf '\n' >&2
      exit 2
    fi
    command=menu
  fi
  shift || true
  case $command in
    help | -h | --help)
      cmd_help
      return
      ;;
    config)
      if [[ ${1:-} == --markdown ]]; then
        cmd_config "$@"
        return
      fi
      ;;
  esac
  load_settings
  case $command in
    # A reader of the output that has gone away must not leave half of it running.
    proxy | prefill | decode | all | stop | restart) trap '' PIPE ;;
  esac
  case $command in
    menu) cmd_menu ;;
    proxy | prefill | decode) cmd_foreground "$command" "$@" ;;
    all) cmd_all "$@" ;;
    test) cmd_test "$@" ;;
    status) cmd_status "$@" ;;
    logs) cmd_logs "$@" ;;
    stop) cmd_stop "$@" ;;
    restart) cmd_restart "$@" ;;
    config) cmd_config "$@" ;;
    doctor) cmd_doctor "$@" ;;
    bench) cmd_bench "$@" ;;
    env) cmd_env "$@" ;;
    page) cmd_page "$@" ;;
    top) cmd_top "$@" ;;
    __supervise) cmd_supervise ;;
    *)
      complain unknown_command "$command"
      text usage "${0##*/}" >&2
      printf '\n' >&2
      exit 2
      ;;
  esac
}
