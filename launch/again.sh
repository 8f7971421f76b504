#!/usr/bin/env bash
# Runs a command, and again while it says that this helps.
#   [RESTARTS=20] launch/again.sh COMMAND...
# Again after 42 (preempted, all is saved) and 75 (stuck, or a process lost), at most RESTARTS
# times; the pause before it doubles from one second to a minute while runs last less than a
# minute. A death by signal, as by the memory killer or by JAX when a peer has ended, counts as 75.
# SIGTERM and SIGINT go on to the command, and then nothing starts again. Ends with the command's
# code.
set -um     # m: a process group for the command, so that Ctrl-C reaches it once, through us
export PYTHONUNBUFFERED=1     # a death by signal would take the last lines with it
left=${RESTARTS:-20} pause=1 asked=0 child=

# A terminal that closes asks to stop as well.
stop() { asked=1; kill "-$1" "$child" 2>/dev/null; }
trap 'stop TERM' TERM HUP
trap 'stop INT' INT

run() {
  "$@" </dev/null &
  child=$!
  ((asked)) && kill "$child"
  # `wait` also returns for a signal to us, and for a command that is only suspended.
  while wait "$child"; kill -0 "$child" 2>/dev/null; do sleep 0.2; done
  wait "$child"       # its code, which bash remembers
}

while :; do
  start=$(date +%s)
  run "$@"
  code=$?
  ((code > 128)) && code=75
  ((code == 42 || code == 75)) && ((left > 0 && asked == 0)) || exit "$code"
  left=$((left - 1)) seconds=$(($(date +%s) - start))
  ((seconds >= 60)) && pause=1
  echo "again.sh: exit code $code after $seconds s, starting again in $pause s" \
    "($left restarts left)" >&2
  run sleep "$pause"
  ((asked)) && exit "$code"
  pause=$((pause < 30 ? 2 * pause : 60))
done
