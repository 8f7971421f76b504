#!/usr/bin/env bash
# Runs a command that outlives this connection, follows its output, and exits with its code.
#   launch/detached.sh COMMAND...    if one runs already, follows that one
#   launch/detached.sh               stops it with SIGTERM and waits for its end
# The output is in /tmp/vdx-UID/log.
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -uo pipefail
at=${TMPDIR:-/tmp}/vdx-$UID        # empty after a reboot, so that it holds no stale process id
mkdir -p "$at"
running() { [[ -s $at/pid ]] && kill -0 "$(<"$at/pid")" 2>/dev/null; }

if (($# == 0)); then
  running && kill -- "-$(<"$at/pid")"
  while running; do sleep 1; done
  exit
fi
if ! running; then
  rm -f "$at/code" && touch "$at/log"
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; "$@"; echo $? >"$0/code"' "$at" "$@" </dev/null >>"$at/log" 2>&1 &
  echo $! >"$at/pid"
fi
tail -n 100 -f --pid="$(<"$at/pid")" "$at/log"
[[ -s $at/code ]] || exit 75        # killed
exit "$(<"$at/code")"
