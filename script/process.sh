# shellcheck shell=bash
# What runs. A process is known by PID, start time and boot, so that a reused PID is never touched;
# nothing is looked up by name. RUN_DIR/NAME.pid holds name=value lines.

PART_PID='' PART_STATE=''
declare -A PART=()

prepare_run_dir() {
  local dir
  for dir in "$RUN_DIR" "$LOG_DIR"; do
    mkdir -p -m 700 -- "$dir" 2>/dev/null || die 1 cannot_make_dir "$dir"
    [[ -w $dir && -O $dir ]] || die 1 dir_not_ours "$dir"
  done
  chmod 700 -- "$RUN_DIR"
}

# read_stat PID: STAT_STATE, STAT_GROUP, STAT_SESSION and STAT_START; false when there is no such process.
read_stat() {
  local line fields
  { IFS= read -r -d '' line <"/proc/$1/stat"; } 2>/dev/null || [[ -n ${line:-} ]] || return 1
  # The second field is the program's name in parentheses and may hold anything.
  read -ra fields <<<"${line##*) }"
  STAT_STATE=${fields[0]} STAT_GROUP=${fields[2]} STAT_SESSION=${fields[3]} STAT_START=${fields[19]}
}

BOOT_ID=unknown
{ read -r BOOT_ID </proc/sys/kernel/random/boot_id; } 2>/dev/null || true

# load_part NAME: the file's fields in PART; PART_STATE is alive, dead (gone, or a zombie) or reused.
load_part() {
  local key value
  PART=() PART_PID='' PART_STATE=''
  [[ -r $RUN_DIR/$1.pid && -O $RUN_DIR/$1.pid ]] || return 1
  while IFS='=' read -r key value; do
    if [[ -n $key ]]; then PART[$key]=$value; fi
  done <"$RUN_DIR/$1.pid"
  PART_PID=${PART[pid]:-}
  PART_STATE=dead
  [[ $PART_PID =~ ^[1-9][0-9]*$ ]] || return 0
  if [[ ${PART[boot]:-} == "$BOOT_ID" ]] && read_stat "$PART_PID"; then
    if [[ $STAT_START != "${PART[start]:-}" ]]; then
      PART_STATE=reused
    elif [[ $STAT_STATE != [ZX] ]]; then
      PART_STATE=alive
    fi
  fi
}

part_alive() {
  load_part "$1" && [[ $PART_STATE == alive ]]
}

# Names of all PID files: the proxy first, engines after it, the supervisor last.
known_parts() {
  local file kind name
  [[ -d $RUN_DIR ]] || return 0
  for kind in proxy prefill decode plain supervisor; do
    for file in "$RUN_DIR/$kind.pid" "$RUN_DIR/$kind"[0-9].pid "$RUN_DIR/$kind"[0-9][0-9].pid; do
      if [[ -f $file ]]; then
        name=${file##*/}
        printf '%s\n' "${name%.pid}"
      fi
    done
  done
}

anything_alive() {
  local name
  for name in $(known_parts); do
    if part_alive "$name"; then return 0; fi
  done
  return 1
}

# spawn NAME LOG COMMAND...: a session of its own, so that Ctrl+C here does not reach it and its children can be
# signalled with it. The child writes its own PID file before it becomes COMMAND, so it is known from
# the first moment. LOG `-` keeps this script's output. Fields for the PID file come from SPAWN_FIELDS.
SPAWN_FIELDS=()
spawn() {
  local name=$1 log=$2
  shift 2
  (
    trap - INT TERM HUP PIPE EXIT
    cd -- "$ROOT"
    release_lock_in_child
    umask 077
    read_stat "$BASHPID"
    printf '%s\n' "pid=$BASHPID" "start=$STAT_START" "boot=$BOOT_ID" "log=$log" \
      "since=$(printf '%(%s)T' -1)" "${SPAWN_FIELDS[@]}" >"$RUN_DIR/$name.pid.new"
    mv -f -- "$RUN_DIR/$name.pid.new" "$RUN_DIR/$name.pid"
    umask 022
    if [[ $log == - ]]; then exec setsid -- "$@" </dev/null; fi
    exec setsid -- "$@" </dev/null >>"$log" 2>&1
  ) &
  SPAWNED=$!
  # The shell says nothing about a job that is killed once it is disowned; one in the foreground is waited for.
  if [[ $log != - ]]; then disown "$SPAWNED"; fi
  # Until setsid has run, the child is in this script's group and could not be signalled as its own.
  while read_stat "$SPAWNED" && [[ $STAT_STATE != [ZX] && $STAT_GROUP != "$SPAWNED" ]]; do sleep 0.02; done
}

# PIDs of a process group that still run, zombies left out. A group outlives its leader.
group_members() {
  local group=$1 path
  for path in /proc/[0-9]*; do
    if read_stat "${path#/proc/}" && [[ $STAT_GROUP == "$group" && $STAT_SESSION == "$group" && $STAT_STATE != [ZX] ]]; then
      printf '%s\n' "${path#/proc/}"
    fi
  done
}

group_gone() {
  [[ -z $(group_members "$1") ]]
}

# Whether PART (loaded) may be signalled as a group: not when its PID belongs to another process by now.
group_is_ours() {
  [[ $PART_PID =~ ^[1-9][0-9]*$ && $PART_STATE != reused && ${PART[boot]:-} == "$BOOT_ID" ]]
}

signal_group() {
  kill "-$1" -- "-$2" 2>/dev/null || kill "-$1" -- "$2" 2>/dev/null || true
}

# stop_parts SECONDS NAME...: TERM to all of them at once, a bounded wait, KILL for what is left.
stop_parts() {
  local seconds=$1 name deadline left
  local -A groups=()
  shift
  for name in "$@"; do
    load_part "$name" || continue
    if group_is_ours && ! group_gone "$PART_PID"; then
      groups[$name]=$PART_PID
      signal_group TERM "$PART_PID"
    fi
  done
  deadline=$((SECONDS + seconds))
  while :; do
    left=''
    for name in "${!groups[@]}"; do
      if group_gone "${groups[$name]}"; then unset "groups[$name]"; else left=1; fi
    done
    [[ -n $left ]] && ((SECONDS < deadline)) || break
    sleep 0.1
  done
  for name in "${!groups[@]}"; do
    warn killing "$name" "${groups[$name]}" "$seconds"
    signal_group KILL "${groups[$name]}"
  done
  for name in "${!groups[@]}"; do
    deadline=$((SECONDS + 10))
    until group_gone "${groups[$name]}" || ((SECONDS >= deadline)); do sleep 0.05; done
  done
  for name in "$@"; do rm -f -- "$RUN_DIR/$name.pid"; done
}

# One generation of each log is kept.
rotate_log() {
  if [[ -s $LOG_DIR/$1.log ]]; then mv -f -- "$LOG_DIR/$1.log" "$LOG_DIR/$1.log.1"; fi
  : >"$LOG_DIR/$1.log"
}
