#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster; the same command resumes.
#   IMAGE=... CLAIM=... ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x8 [CHIPS=4] \
#     launch/gke.sh [--dry-run] CONFIG WORKDIR [--config.key=value ...]
# IMAGE holds the code (launch/Dockerfile). CLAIM is a volume claim that all pods can write; it is
# /mnt/shared in them. ACCELERATOR and TOPOLOGY are labels of the node pool, CHIPS is what one of
# its nodes has. Called again it stops the job, which saves, and starts a new one; --dry-run prints.
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -euo pipefail
dry=
[[ ${1:-} != --dry-run ]] || { dry=1; shift; }
: "${IMAGE:?a container image with the code, see launch/Dockerfile}"
: "${CLAIM:?a PersistentVolumeClaim that is ReadWriteMany}"
: "${ACCELERATOR:?e.g. tpu-v5-lite-podslice}" "${TOPOLOGY:?e.g. 4x8}" "${CHIPS:=4}"
config=${1:?a config, e.g. configs/t2v_base.py} workdir=${2:?a workdir, e.g. /mnt/shared/runs/base}
name=vdx-$(basename "$workdir" | tr 'A-Z_.' 'a-z--')
chips=$((${TOPOLOGY//x/*}))
hosts=$((chips / CHIPS))
((hosts * CHIPS == chips)) || { echo "gke.sh: $chips chips are not nodes of $CHIPS" >&2; exit 1; }

# Prints one item of a YAML list; Kubernetes would substitute a variable for $(NAME).
item() { local text=${1//\'/\'\'}; printf "\n            - '%s'" "${text//\$(/\$\$(}"; }
command=$(for arg in launch/again.sh python3 -m vdx.main --config="$config" \
  --workdir="$workdir" --distributed "${@:3}"; do item "$arg"; done)

manifest() {
  cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None                   # pods reach each other by name
  publishNotReadyAddresses: true
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  backoffLimit: 6                   # of pods that the memory killer ended
  podFailurePolicy:                 # the first rule that matches
    rules:
      - action: Ignore              # a node was preempted or drained: another pod
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
      - action: Ignore              # preempted and saved, stuck, or a process lost
        onExitCodes:
          containerName: vdx
          operator: In
          values: [42, 75]
      - action: FailJob             # an error to fix
        onExitCodes:
          containerName: vdx
          operator: NotIn
          values: [42, 75, 137]
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
        cloud.google.com/gke-tpu-topology: $TOPOLOGY
      containers:
        - name: vdx
          image: $IMAGE
          workingDir: /vdx
          command:$command
          env:
            - name: JAX_PLATFORMS
              value: tpu,cpu
          resources:
            requests:
              google.com/tpu: $CHIPS
            limits:
              google.com/tpu: $CHIPS
          volumeMounts:
            - name: shared
              mountPath: /mnt/shared
            - name: memory
              mountPath: /dev/shm
      volumes:
        - name: shared
          persistentVolumeClaim:
            claimName: $CLAIM
        - name: memory              # for the data workers; the default of 64 MiB is too small
          emptyDir:
            medium: Memory
YAML
}

if [[ -n $dry ]]; then
  manifest
  exit
fi
kubectl delete job "$name" --ignore-not-found --cascade=foreground
manifest | kubectl apply -f -
echo "To follow: kubectl logs -f job/$name. To stop: kubectl delete job $name"
