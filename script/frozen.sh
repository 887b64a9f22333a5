# shellcheck shell=bash
# Engines that the proxy wants restarted (`restart_wanted` in /stats): frozen, so that they ping and answer /health while their
# forward pass is stalled, or hung, so that they neither ping nor answer. Only the proxy can tell. The supervisor ends such
# an engine and then treats it as one that has died. Exempt are
#   an engine in the foreground: the log says once what to do;
#   a process that may be younger than the wish, since the proxy needs a moment to see that an engine was restarted: it must
#   have been seen content with this one, or this one must be a minute old and listen.

NEXT_LOOK=0                # when to ask again, in bash's SECONDS
declare -A CONTENT_WITH=() # the PID with which the proxy was seen content, by name

# Asks without the lock, which is taken only when there is something to do.
look_for_frozen() {
  local name
  local -a wanted=()
  local -A pid=()
  for name in "${DECODES[@]}" "${PREFILLS[@]}"; do
    if part_alive "$name"; then pid[$name]=$PART_PID; fi
  done
  # A proxy that hangs is asked less often, or waiting for it would take the supervisor's time from what dies.
  NEXT_LOOK=$((SECONDS + 10))
  ((${#pid[@]})) && proxy_get /stats && [[ $HTTP_STATUS == 200 ]] || return 0
  NEXT_LOOK=$((SECONDS + 2))
  PROXY_WANTS=()
  # No Python while all is well.
  if [[ $HTTP_BODY =~ \"restart_wanted\":[[:space:]]*true ]]; then read_instances; fi
  # A decode first: a prefill that goes with it is no case of its own.
  for name in "${DECODES[@]}" "${PREFILLS[@]}"; do
    [[ -n ${pid[$name]:-} ]] || continue
    if [[ -n ${PROXY_WANTS[${PART_HTTP[$name]}]:-} ]]; then wanted+=("$name"); else CONTENT_WITH[$name]=${pid[$name]}; fi
  done
  ((${#wanted[@]})) && take_lock 0 supervisor 2>/dev/null || return 0
  for name in "${wanted[@]}"; do
    if part_alive "$name" && [[ $PART_PID == "${pid[$name]}" ]]; then
      end_frozen "$name" "${PROXY_WANTS[${PART_HTTP[$name]}]}"
    fi
  done
  release_lock
}

# end_frozen NAME REASON: NAME is loaded and alive.
end_frozen() {
  local name=$1 reason=$2
  wish_is_for_this "$name" || return 0
  if [[ ${PART[mode]:-} == foreground ]]; then
    say_once sup_frozen_terminal "$name" "$PART_PID" "$reason"
  else
    supervisor_says sup_frozen "$name" "$PART_PID" "$reason"
    fell "$name" "$reason"
  fi
}

wish_is_for_this() {
  local now
  printf -v now '%(%s)T' -1
  [[ ${CONTENT_WITH[$1]:-} == "$PART_PID" ]] || { ((now - ${PART[since]:-now} >= 60)) && port_taken "${PART_HTTP[$1]}"; }
}
