#!/usr/bin/env bash
# Train on every host of a Cloud TPU slice; the same command resumes.
#   TPU=name ZONE=zone launch/tpu_pod.sh CONFIG WORKDIR [--config.key=value ...]
# Requests the slice first if ACCELERATOR (e.g. v5litepod-64) and VERSION (a TPU VM image) are set,
# as a spot slice with SPOT=1, and waits for it in the queue. The hosts get the code as committed.
# They keep running when this command is interrupted. Called again it stops them, which saves,
# sends the current code, and they resume.
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?the name of the TPU slice}" "${ZONE:?its zone}"
config=${1:?a config, e.g. configs/t2v_base.py}
workdir=${2:?a workdir that every host can write, e.g. in a mounted bucket: /mnt/runs/base}

queue() { gcloud compute tpus queued-resources "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

wait_for_slice() {
  local state before=none
  while state=$(queue describe --format='value(state.state)' 2>/dev/null) || state=
    [[ $state != ACTIVE ]]; do
    [[ $state == "$before" ]] || echo "tpu_pod.sh: $TPU is ${state:-not there yet}" >&2
    before=$state
    case $state in
      FAILED)
        queue describe --format='yaml(state)' >&2
        echo "tpu_pod.sh: the request for $TPU failed, for the reason above. Mend it, delete the" \
          "request (gcloud compute tpus queued-resources delete $TPU --zone=$ZONE), call again." >&2
        return 1 ;;
      SUSPENDED)        # its machines are gone: a spot slice was preempted
        echo "tpu_pod.sh: $TPU was taken back; asking for it again" >&2
        queue delete --force --quiet ;;
      "")
        queue create --node-id="$TPU" --accelerator-type="$ACCELERATOR" ${SPOT:+--spot} \
          --runtime-version="${VERSION:?a TPU VM image, e.g. v2-alpha-tpuv5-lite}" ;;
    esac
    sleep 30
  done
}
[[ -z ${ACCELERATOR:-} ]] || wait_for_slice

[[ -z $(git status --porcelain) ]] || echo "tpu_pod.sh: what is not committed stays here" >&2
archive=$(mktemp --suffix=.tar)
trap 'rm -f "$archive"' EXIT
git archive --prefix=vdx/ -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU":vdx.tar --zone="$ZONE" --worker=all
# uv installs its own Python: that of the TPU VM images is older than vdx needs.
everywhere 'if [ -x vdx/launch/detached.sh ]; then vdx/launch/detached.sh; fi && tar xf vdx.tar &&
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv &&
  python3 -m uv venv -q --allow-existing --python=3.12 env &&
  python3 -m uv pip install -q --python=env/bin/python -e "vdx[tpu]"'
printf -v run '%q ' env JAX_PLATFORMS=tpu,cpu RESTARTS="${RESTARTS:-20}" launch/detached.sh \
  launch/again.sh python3 -m vdx.main --config="$config" --workdir="$workdir" --distributed "${@:3}"
everywhere "cd vdx && PATH=~/env/bin:\$PATH $run"
