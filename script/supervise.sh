# shellcheck shell=bash
# Restarting what falls: what dies, and what frozen.sh ends. A process of its own, so that `stop` can stop it first. A part
# whose PID file is gone was stopped on purpose; one in the foreground is its terminal's business.
#   proxy or prefill falls   it alone is restarted
#   decode falls             it is restarted, and so are the prefills that have sent to it: with P2pNcclConnector they stay
#                            frozen otherwise; with this project's they go on
# Waits double with every fall; a part that falls too often is given up, with the end of its log.

SUPERVISOR_DONE=''
declare -A DEATHS=() RESTART_AT=() GIVEN_UP=() SAID=()

start_supervisor() {
  local name settings=()
  for name in "${SETTING_NAMES[@]}"; do
    case $name in
      CONFIG) settings+=(CONFIG=) ;;
      ENGINE) settings+=("ENGINE=$ENGINE_KIND") ;;
      # A Python that was given decides where vLLM is looked for first.
      PYTHON) if [[ ${SETTING_SOURCE[PYTHON]} != default ]]; then settings+=("PYTHON=$PYTHON"); fi ;;
      *) if [[ ${SETTING_KIND[$name]} != secret ]]; then settings+=("$name=${!name}"); fi ;;
    esac
  done
  pass_keys
  rotate_log supervisor
  SPAWN_FIELDS=(kind=script role=supervisor mode=background)
  spawn supervisor "$LOG_DIR/supervisor.log" env "${settings[@]}" "$BASH" "$SELF" __supervise
}

cmd_supervise() {
  trap 'SUPERVISOR_DONE=1' TERM INT
  trap '' HUP
  ensure_python
  resolve_engine
  layout
  # Reading from a pipe that nobody writes to waits without starting a process.
  local quiet _
  exec {quiet}<> <(:)
  supervisor_says sup_watching "${PARTS[*]}"
  while [[ -z $SUPERVISOR_DONE ]]; do
    if something_to_do; then supervise_once; fi
    if ((SECONDS >= NEXT_LOOK)); then look_for_frozen; fi
    read -r -t 0.4 -u "$quiet" _ || true
  done
  supervisor_says sup_ends
}

supervisor_says() {
  printf '%(%Y-%m-%d %H:%M:%S)T %s\n' -1 "$(text "$@")"
}

# say_once KEY NAME PID [MORE...]: not again about the same process.
say_once() {
  [[ ${SAID["$1 $2"]:-} != "$3" ]] || return 0
  SAID["$1 $2"]=$3
  supervisor_says "$@"
}

# A look without the lock, so that a quiet machine costs next to nothing.
something_to_do() {
  local name
  ((${#RESTART_AT[@]} == 0)) || return 0
  for name in "${PARTS[@]}"; do
    load_part "$name" || continue
    if [[ $PART_STATE == alive && -z ${GIVEN_UP[$name]:-} ]]; then continue; fi
    if [[ $PART_STATE != alive && -n ${GIVEN_UP[$name]:-} ]]; then continue; fi
    return 0
  done
  return 1
}

supervise_once() {
  local name asked=''
  # Another command that changes what runs has the lock: deaths are its doing.
  take_lock 0 supervisor 2>/dev/null || return 0
  for name in "${PARTS[@]}"; do
    if ! load_part "$name"; then
      unset "RESTART_AT[$name]"
    elif [[ $PART_STATE == alive || ${PART[mode]:-} == foreground ]]; then
      # Somebody brought it back: a fresh start for one that was given up.
      if [[ -n ${GIVEN_UP[$name]:-} ]]; then unset "GIVEN_UP[$name]" "DEATHS[$name]"; fi
      unset "RESTART_AT[$name]"
    elif [[ -z ${RESTART_AT[$name]:-}${GIVEN_UP[$name]:-} ]]; then
      fell "$name"
    fi
  done
  for name in "${!RESTART_AT[@]}"; do
    (($(now_ms) >= RESTART_AT[$name])) && may_start "$name" || continue
    # For the PID files. Once is enough, should it not answer.
    if [[ -z $asked ]]; then ask_proxy; fi
    asked=1
    start_again "$name"
  done
  release_lock
}

now_ms() {
  local now=${EPOCHREALTIME:-}
  if [[ -n $now ]]; then
    now=${now/[.,]/}
    printf '%s' "${now%???}"
  else
    printf '%(%s)T000' -1
  fi
}

# fell NAME [REASON]: NAME (loaded) died, or is frozen as the REASON says. What is left of it goes, and so do the prefills
# that depend on it, before anything starts.
fell() {
  local name=$1 reason=${2:-} pid=$PART_PID message=sup_died why count wait_ms prefill
  local -a partners=()
  local -A partner_pid=()
  why=$(text sup_why_died "$pid")
  if [[ -n $reason ]]; then message=sup_ended why=$(text sup_why_froze "$pid" "$reason"); fi
  count_fall "$name"
  count=$(wc -w <<<"${DEATHS[$name]}")
  if [[ ${PART_ROLE[$name]} == decode ]]; then
    while read -r prefill; do
      load_part "$prefill" || continue
      if [[ -n ${GIVEN_UP[$prefill]:-}${RESTART_AT[$prefill]:-} ]]; then continue; fi
      if [[ ${PART[mode]:-} == foreground ]]; then
        say_once sup_partner_terminal "$prefill" "$PART_PID" "$name"
      else
        partners+=("$prefill")
        partner_pid[$prefill]=$PART_PID
      fi
    done < <(paired_prefills "$name")
  fi
  leave_markers "$name" "${partners[@]}"
  if ((count > RESTART_LIMIT)); then
    GIVEN_UP[$name]=1
    supervisor_says sup_given_up "$name" "$count" "$RESTART_WINDOW"
    tail -n 15 -- "$LOG_DIR/$name.log" | sed 's/^/    /'
    note_restart "$name" given-up "$(text sup_why_loop "$count" "$why")"
  else
    wait_ms=$(backoff_ms "$count")
    RESTART_AT[$name]=$(($(now_ms) + wait_ms))
    supervisor_says "$message" "$name" "$pid" "$((wait_ms / 1000)).$((wait_ms % 1000 / 100))" "$count" "$RESTART_LIMIT"
    note_restart "$name" waiting "$why"
  fi
  for prefill in "${partners[@]}"; do
    supervisor_says sup_partner "$prefill" "${partner_pid[$prefill]}" "$name"
    RESTART_AT[$prefill]=$(now_ms)
    note_restart "$prefill" waiting "$(text sup_why_partner "$name")"
  done
}

# Adds this moment to the falls of NAME; those before RESTART_WINDOW do not count any more.
count_fall() {
  local now time times=''
  printf -v now '%(%s)T' -1
  for time in ${DEATHS[$1]:-}; do
    if ((now - time < RESTART_WINDOW)); then times+="$time "; fi
  done
  DEATHS[$1]=$times$now
}

# leave_markers NAME...: ends what is left of these parts, all at once, and keeps PID files that stand for "wanted, but
# not running".
leave_markers() {
  local name
  local -A places=()
  for name in "$@"; do
    load_part "$name" || true
    places[$name]="http=${PART[http]:-}"$'\n'"log=${PART[log]:-}"$'\n'"connector=${PART[connector]:-}"
  done
  stop_parts 3 "$@"
  for name in "$@"; do
    printf '%s\n' pid=0 mode=background "role=${PART_ROLE[$name]}" "kind=$(kind_of "$name")" "${places[$name]}" >"$RUN_DIR/$name.pid"
  done
}

backoff_ms() {
  local -i times=$1
  local base
  base=$(whole "${RESTART_BACKOFF}e3")
  if ((times > 7)); then times=7; fi
  base=$((base << (times - 1)))
  if ((base > 60000)); then base=60000; fi
  printf '%s' "$base"
}

# An engine waits for another one on its GPU to be ready, and for its ports to be free.
may_start() {
  local other port
  for port in $(ports_of "$1"); do
    if port_taken "$port"; then
      supervisor_says sup_port "$1" "$port" "$(port_holder "$port")"
      RESTART_AT[$1]=$(($(now_ms) + 5000))
      return 1
    fi
  done
  [[ $ENGINE_KIND == vllm && $1 != proxy ]] || return 0
  for other in "${PREFILLS[@]}" "${DECODES[@]}"; do
    if [[ $other != "$1" ]] && share_gpu "$1" "$other" && part_alive "$other" && ! engine_ready "$other"; then return 1; fi
  done
}

start_again() {
  local name=$1
  unset "RESTART_AT[$name]"
  {
    printf '\n'
    supervisor_says sup_log_mark "$name"
  } >>"$LOG_DIR/$name.log"
  launch "$name" "$LOG_DIR/$name.log"
  supervisor_says sup_started "$name" "$SPAWNED"
  note_restart "$name" running
}

# note_restart NAME STATE [REASON]: what `status` shows. A start counts; the reason stays.
note_restart() {
  local count=0 reason='' key value
  if [[ -r $RUN_DIR/$1.restarts ]]; then
    while IFS='=' read -r key value; do
      case $key in
        count) count=$value ;;
        reason) reason=$value ;;
      esac
    done <"$RUN_DIR/$1.restarts"
  fi
  if [[ $2 == running ]]; then count=$((count + 1)); fi
  printf '%s\n' "count=$count" "state=$2" "at=$(printf '%(%s)T' -1)" "reason=${3:-$reason}" >"$RUN_DIR/$1.restarts"
}
