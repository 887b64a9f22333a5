# shellcheck shell=bash
# Looking at ports and asking small HTTP questions, without curl, ss or lsof.

HTTP_STATUS=000
HTTP_BODY=''

# Where to reach a server that listens on HOST.
reach() {
  case $1 in
    0.0.0.0 | '') printf 127.0.0.1 ;;
    :: | '[::]') printf ::1 ;;
    *) printf '%s' "$1" ;;
  esac
}

# HOST:PORT as it stands in a URL.
authority() {
  local host
  host=$(reach "$1")
  if [[ $host == *:* ]]; then host="[$host]"; fi
  printf '%s:%s' "$host" "$2"
}

# http_get HOST PORT PATH [KEY]: HTTP_STATUS and HTTP_BODY; false, with 000 and nothing, when no whole answer came
# within 3 s. A program of its own asks: bash cannot limit how long it waits for a connection, and a peer that hangs up
# must not end this script with SIGPIPE. The key goes through the environment, where `ps` of other users does not show it.
http_get() {
  local answer
  HTTP_STATUS=000 HTTP_BODY=''
  answer=$(HTTP_KEY=${4:-} timeout --foreground 3 "$BASH" -p -c "$HTTP_PROGRAM" http_get "$1" "$2" "$3" 2>/dev/null) || return 1
  HTTP_STATUS=${answer%%$'\n'*}
  HTTP_BODY=${answer#*$'\n'}
}

http_raw() {
  local host=$1 port=$2 path=$3 fd line status
  exec {fd}<>"/dev/tcp/$host/$port" || return 1
  printf 'GET %s HTTP/1.0\r\nHost: %s:%s\r\n%sConnection: close\r\n\r\n' "$path" "$host" "$port" \
    "${HTTP_KEY:+Authorization: Bearer $HTTP_KEY$'\r\n'}" >&"$fd" || return 1
  IFS= read -r -u "$fd" line || return 1
  [[ $line =~ ^HTTP/1\.[01]\ ([0-9]{3}) ]] || return 1
  status=${BASH_REMATCH[1]}
  while IFS= read -r -u "$fd" line && [[ $line != $'\r' && -n $line ]]; do :; done
  printf '%s\n' "$status"
  while IFS= read -r -u "$fd" line; do printf '%s\n' "$line"; done
  printf '%s' "$line"
}
HTTP_PROGRAM="$(declare -f http_raw); http_raw \"\$@\""

proxy_get() {
  http_get "$(reach "$HTTP_PROXY_HOST")" "$HTTP_PROXY_PORT" "$1" "$API_KEY"
}

# The inode of a socket that listens on PORT; nothing when the port is free. The tables are read whole: line by line,
# the kernel would make them again for each line.
listener_inode() {
  local hex table words
  printf -v hex '%04X' "$1"
  for table in /proc/net/tcp /proc/net/tcp6; do
    if [[ -r $table && $(<"$table") =~ :$hex\ [0-9A-F]+:[0-9A-F]+\ 0A\ ([^$'\n']*) ]]; then
      read -ra words <<<"${BASH_REMATCH[1]}"
      printf '%s' "${words[5]}"
      return 0
    fi
  done
  return 1
}

port_taken() {
  listener_inode "$1" >/dev/null
}

# Who holds PORT, in words.
port_holder() {
  local inode path pid
  inode=$(listener_inode "$1") || return 0
  path=$(find /proc/[0-9]*/fd -maxdepth 1 -lname "socket:\\[$inode\\]" -print -quit 2>/dev/null) || true
  if [[ $path =~ ^/proc/([0-9]+)/ ]]; then
    pid=${BASH_REMATCH[1]}
    text held_by "$pid" "$(command_line "$pid")"
  else
    text held_by_other
  fi
}

command_line() {
  local words=()
  mapfile -d '' -t words <"/proc/$1/cmdline" 2>/dev/null || true
  plain_line "$(printf '%.120s' "${words[*]}")"
}
