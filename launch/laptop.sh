#!/usr/bin/env bash
# Train on this machine; the same command resumes.
#   launch/laptop.sh [config] [workdir] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-configs/t2v_tiny.py}
workdir=${2:-runs/$(basename "${config%%.py*}")}
exec launch/again.sh python3 -m vdx.main --config="$config" --workdir="$workdir" "${@:3}"
