#!/usr/bin/env bash
# One machine, one script: the proxy, prefill and decode engines, from set-up to stop.
#
#   ./test_single_machine.sh            the menu
#   ./test_single_machine.sh all        everything in the background
#   ./test_single_machine.sh help       commands, settings, exit codes
#
# Data goes to stdout, messages to stderr.
# Exit codes: 0 all went well; 1 something failed; 2 wrong usage or a bad setting;
# 3 nothing is running (status, stop NAME, test, bench, logs); 130 interrupted; 143 terminated.

if [ -z "${BASH_VERSION:-}" ]; then
  exec bash "$0" "$@"
fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "test_single_machine.sh: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi
set -Eeuo pipefail
shopt -s inherit_errexit

SELF=$(readlink -f -- "${BASH_SOURCE[0]}")
ROOT=${SELF%/*}
INVOKED_FROM=$PWD
readonly SELF ROOT INVOKED_FROM

# shellcheck source=script/messages.sh
source "$ROOT/script/messages.sh"
# shellcheck source=script/ui.sh
source "$ROOT/script/ui.sh"
# shellcheck source=script/settings_table.sh
source "$ROOT/script/settings_table.sh"
# shellcheck source=script/settings.sh
source "$ROOT/script/settings.sh"
# shellcheck source=script/net.sh
source "$ROOT/script/net.sh"
# shellcheck source=script/process.sh
source "$ROOT/script/process.sh"
# shellcheck source=script/lock.sh
source "$ROOT/script/lock.sh"
# shellcheck source=script/python.sh
source "$ROOT/script/python.sh"
# shellcheck source=script/engine.sh
source "$ROOT/script/engine.sh"
# shellcheck source=script/layout.sh
source "$ROOT/script/layout.sh"
# shellcheck source=script/launch.sh
source "$ROOT/script/launch.sh"
# shellcheck source=script/up.sh
source "$ROOT/script/up.sh"
# shellcheck source=script/down.sh
source "$ROOT/script/down.sh"
# shellcheck source=script/supervise.sh
source "$ROOT/script/supervise.sh"
# shellcheck source=script/frozen.sh
source "$ROOT/script/frozen.sh"
# shellcheck source=script/look.sh
source "$ROOT/script/look.sh"
# shellcheck source=script/try.sh
source "$ROOT/script/try.sh"
# shellcheck source=script/bench.sh
source "$ROOT/script/bench.sh"
# shellcheck source=script/setups.sh
source "$ROOT/script/setups.sh"
# shellcheck source=script/watch.sh
source "$ROOT/script/watch.sh"
# shellcheck source=script/doctor.sh
source "$ROOT/script/doctor.sh"
# shellcheck source=script/doctor_gpus.sh
source "$ROOT/script/doctor_gpus.sh"
# shellcheck source=script/menu.sh
source "$ROOT/script/menu.sh"
# shellcheck source=script/commands.sh
source "$ROOT/script/commands.sh"

main "$@"
