# shellcheck shell=bash
# One command at a time changes what runs in a RUN_DIR. The lock is the kernel's (flock), so a killed
# holder leaves nothing behind; RUN_DIR/lock says who holds it.

LOCK_FD=''

# take_lock SECONDS COMMAND: waits that long; false when another command still holds it.
take_lock() {
  local seconds=$1 what=$2
  exec {LOCK_FD}>>"$RUN_DIR/lock"
  if ! flock -w "$seconds" "$LOCK_FD"; then
    exec {LOCK_FD}>&-
    LOCK_FD=''
    return 1
  fi
  read_stat "$BASHPID"
  printf 'pid=%s\nstart=%s\nboot=%s\ncommand=%s\n' "$BASHPID" "$STAT_START" "$BOOT_ID" "$what" >"$RUN_DIR/lock"
}

# The lock, or the end with what is in the way. The supervisor's turns are short, so they are waited for.
lock_for() {
  prepare_run_dir
  take_lock 0 "$1" && return 0
  if lock_holder && [[ $LOCK_COMMAND != supervisor && $1 == all ]]; then die 1 busy "$LOCK_COMMAND" "$LOCK_PID"; fi
  take_lock 60 "$1" && return 0
  lock_holder || true
  die 1 busy "${LOCK_COMMAND:-?}" "${LOCK_PID:-?}"
}

release_lock() {
  if [[ -n $LOCK_FD ]]; then
    : >"$RUN_DIR/lock"
    exec {LOCK_FD}>&-
    LOCK_FD=''
  fi
}

release_lock_in_child() {
  if [[ -n $LOCK_FD ]]; then exec {LOCK_FD}>&-; fi
}

# The holder's fields in LOCK_PID and LOCK_COMMAND; false when nobody is known.
lock_holder() {
  local key value start='' boot=''
  LOCK_PID='' LOCK_COMMAND=''
  [[ -r $RUN_DIR/lock ]] || return 1
  while IFS='=' read -r key value; do
    case $key in
      pid) LOCK_PID=$value ;;
      start) start=$value ;;
      boot) boot=$value ;;
      command) LOCK_COMMAND=$value ;;
    esac
  done <"$RUN_DIR/lock"
  [[ -n $LOCK_PID && $boot == "$BOOT_ID" ]] && read_stat "$LOCK_PID" && [[ $STAT_START == "$start" ]]
}
