#!/usr/bin/env bash
# Runs a command, and restarts it while its exit code says that this helps.
#   [RESTARTS=20] launch/again.sh COMMAND...
# Restarts after 42 (preempted, all is saved) and 75 (stuck, or a process lost), at most RESTARTS
# times. The pause before a restart doubles from one second to a minute while runs last less than a
# minute. A death by signal (the memory killer, or JAX when a peer has ended) counts as 75.
# SIGTERM and SIGINT are passed to the command; after them nothing restarts. Exits with the
# command's code.
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -um     # m: a process group for the command, so that Ctrl-C reaches it once, from here
export PYTHONUNBUFFERED=1     # a death by signal would take the last lines with it
left=${RESTARTS:-20} pause=1 asked=0 child=

# A closing terminal stops the command too.
stop() { asked=1; kill "-$1" "$child" 2>/dev/null; }
trap 'stop TERM' TERM HUP
trap 'stop INT' INT

run() {
  "$@" </dev/null &
  child=$!
  ((asked)) && kill "$child"
  # `wait` also returns when this script gets a signal, or the command is only suspended.
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
