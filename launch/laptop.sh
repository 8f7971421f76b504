#!/usr/bin/env bash
# Train on this machine; the same command resumes.
#   launch/laptop.sh [config] [workdir] [--config.key=value ...]
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-configs/t2v_tiny.py}
workdir=${2:-runs/$(basename "${config%%.py*}")}
exec launch/again.sh python3 -m vdx.main --config="$config" --workdir="$workdir" "${@:3}"
