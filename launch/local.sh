#!/usr/bin/env bash
# Train in several processes on this machine; the same command resumes.
#   launch/local.sh --processes=2 [--devices=1] CONFIG WORKDIR [--config.key=value ...]
# Each process has `devices` CPU devices, or the accelerators that CUDA_VISIBLE_DEVICES lists split
# between them. Ends with the exit code of the run: 0 done, 1 an error to fix. After 42 (preempted)
# and 75 (stuck, or a process lost) again.sh restarts all of them.
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -uo pipefail
cd "$(dirname "$0")/.."
# again.sh calls this script a second time, for one life of all processes.
[[ -n ${ONE_LIFE:-} ]] || ONE_LIFE=1 exec launch/again.sh launch/local.sh "$@"

processes=2 devices=1
while [[ ${1:-} == --* ]]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    *) echo "local.sh: unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
config=${1:?a config, e.g. configs/t2v_tiny.py} workdir=${2:?a workdir}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

pids=()
trap 'kill "${pids[@]}" 2>/dev/null' TERM INT
port=$(python3 -c 'import socket
with socket.socket() as s: s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for ((i = 0; i < processes; i++)); do
  # Only the first process prints progress; the others print errors.
  python3 -m vdx.main --config="$config" --workdir="$workdir" --coordinator="127.0.0.1:$port" \
    --num_processes="$processes" --process_id="$i" "${@:3}" &
  pids+=($!)
done
code=0 left=("${pids[@]}")
while ((${#left[@]})); do
  wait -n -p ended "${left[@]}"
  one=$?
  [[ -z ${ended:-} ]] && continue        # interrupted by a signal
  still=()
  for pid in "${left[@]}"; do [[ $pid != "$ended" ]] && still+=("$pid"); done
  left=("${still[@]}")
  # The first failure is the cause; peers of a lost process end within the heartbeat.
  ((one != 0 && code == 0)) && code=$one
done
exit "$code"
