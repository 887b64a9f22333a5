# shellcheck shell=bash
# The menu. Each entry runs this script with a command, so menu and commands cannot differ, and a command that
# fails or is interrupted returns here.

# number|command|message key
MENU_TABLE='1|proxy|menu_proxy
2|prefill|menu_prefill
3|decode|menu_decode
4|all|menu_all
5|test|menu_test
6|config|menu_config
7|status|menu_status
8|logs|menu_logs
9|stop|menu_stop
10|restart|menu_restart
11|doctor|menu_doctor
12|bench|menu_bench
13|env|menu_env
14|page|menu_page
15|top|menu_top
16|help|menu_help'

show_menu() {
  local number command key
  printf '\n%s%s%s\n' "$COLOR_BOLD" "$(text menu_title)" "$COLOR_OFF" >&2
  while IFS='|' read -r number command key; do
    printf ' %2s) %-9s %s\n' "$number" "$command" "$(text "$key")" >&2
  done <<<"$MENU_TABLE"
  printf ' %2s) %s\n' 0 "$(text menu_quit)" >&2
}

cmd_menu() {
  local choice number command key chosen
  while :; do
    show_menu
    trap 'printf "\n" >&2; exit 130' INT
    if ! read -r -p "$(text menu_prompt)" choice; then
      printf '\n' >&2
      return 0
    fi
    choice=${choice//[[:space:]]/}
    if [[ -z $choice ]]; then continue; fi
    if [[ $choice == 0 || $choice == q ]]; then return 0; fi
    chosen=''
    while IFS='|' read -r number command key; do
      if [[ $choice == "$number" || $choice == "$command" ]]; then chosen=$command; fi
    done <<<"$MENU_TABLE"
    if [[ -z $chosen ]]; then
      warn menu_unknown "$choice"
      continue
    fi
    run_entry "$chosen"
  done
}

run_entry() {
  local status=0 part=''
  if [[ $1 == bench ]]; then
    read -r -p "$(text menu_bench_how)" part || return 0
    part=${part//[[:space:]]/}
    case $part in
      '' | 1) part='' ;;
      2) part=--ratio ;;
      3) part=--against-plain ;;
      4) part=--once ;;
      *)
        warn menu_unknown "$part"
        return 0
        ;;
    esac
  elif [[ $1 == restart ]]; then
    read -r -p "$(text menu_which)" part || return 0
    part=${part//[[:space:]]/}
    if [[ -z $part ]]; then return 0; fi
  fi
  # Caught, not ignored: the command gets Ctrl+C as usual, and the menu stays.
  trap ':' INT
  "$BASH" "$SELF" "$1" ${part:+"$part"} || status=$?
  if ((status)); then say menu_ended "$1" "$status"; fi
}
