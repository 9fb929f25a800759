#!/usr/bin/env bash
# Slurm's batch script of a run, on the first of its nodes: one process a GPU, until it is done.
#
#   slurm_job.sh MAX_RESTARTS PAUSE_SECONDS COMMAND [ARGUMENT ...]
#
# Exit code 42: the trainer saved after SIGTERM, before the time limit or a preemption; the job is queued again.
# Exit codes 127 to 255: a crash; it starts again here. Others are final.
set -euo pipefail
max_restarts=$1
pause_seconds=$2
shift 2

trainer=
stopping=
pass_on() {
  stopping=yes
  if [[ -n $trainer ]]; then kill -TERM "$trainer" 2>/dev/null || true; fi # srun passes it on to its tasks
}
trap pass_on TERM INT

# Runs on all nodes; sets `code`. One process that ends does not kill others, which may be saving.
train() {
  code=0
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpu-bind=none --kill-on-bad-exit=0 --wait=0 "$@" &
  trainer=$!
  wait "$trainer" || code=$?
  while kill -0 "$trainer" 2>/dev/null; do # a signal ends `wait` early
    code=0
    wait "$trainer" || code=$?
  done
  trainer=
}

# A cancelled job must not come back, and a preempted one is queued again by Slurm itself.
queue_again() {
  local state restarts=${SLURM_RESTART_COUNT:-0}
  state=$(squeue --noheader --states=all --format=%T --jobs="$SLURM_JOB_ID") || state=unknown
  if [[ $state != RUNNING ]]; then
    echo "slurm_job: not queued again: the job is $state" >&2
  elif ((restarts >= max_restarts)); then
    echo "slurm_job: not queued again after $restarts times; launch again to go on" >&2
  else
    echo "slurm_job: queued again, $((restarts + 1)) of at most $max_restarts" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

for ((restart = 0; ; restart++)); do
  train "$@"
  if ((code == 42)); then
    queue_again
    exit 42
  elif ((code < 127)) || [[ -n $stopping ]]; then
    exit "$code"
  elif ((restart == max_restarts)); then
    echo "slurm_job: exit code $code after $max_restarts restarts; launch again to go on" >&2
    exit "$code"
  fi
  echo "slurm_job: crashed with exit code $code; restart $((restart + 1)) of at most $max_restarts in $pause_seconds s" >&2
  sleep "$pause_seconds" &
  wait $! || true
  if [[ -n $stopping ]]; then exit "$code"; fi
done
