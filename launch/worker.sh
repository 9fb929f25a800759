#!/usr/bin/env bash
# Runs on each worker of a TPU VM, from the home folder, where walt_jax/ is the copied clone.
#
#   worker.sh install [--nfs HOST:/SHARE FOLDER]
#   worker.sh run MAX_RESTARTS PAUSE_SECONDS COMMAND [ARGUMENT ...]
#   worker.sh stop
#   worker.sh status
#
# What `run` starts outlives the connection; another `run` shows its log instead of starting a second trainer.
set -euo pipefail
script=$(realpath "$0")
cd "$HOME"
state=walt_jax_run # holds the log; the process id of what runs; the exit code of what ran
mkdir -p "$state"
export PATH="$HOME/walt_jax_venv/bin:$PATH"

running() {
  [[ -s $state/pid && ! -e $state/exit_code ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

install() {
  if [[ ${1:-} == --nfs ]]; then
    sudo mkdir -p "$3"
    if ! mountpoint -q "$3"; then
      sudo apt-get install --yes --quiet nfs-common
      sudo mount -t nfs -- "$2" "$3"
    fi
  fi
  # The images' Python can be older than the 3.11 that walt_jax needs.
  python3 -m pip install --user --quiet uv
  [[ -e walt_jax_venv ]] || python3 -m uv venv --python=3.12 walt_jax_venv
  python3 -m uv pip install --quiet --python=walt_jax_venv/bin/python --editable 'walt_jax[tpu]'
}

# Runs without a terminal, and leaves the exit code.
supervise() {
  local code=0
  (cd walt_jax && exec python -m launch.restart --max_restarts="$1" --pause_seconds="$2" -- "${@:3}") &
  echo $! >"$state/pid"
  wait $! || code=$?
  echo "$code" >"$state/exit_code.new"
  mv "$state/exit_code.new" "$state/exit_code"
}

run() {
  exec 9>"$state/lock"
  flock 9 # two that start at once
  if ! running; then
    rm -f "$state/pid" "$state/exit_code"
    setsid --fork bash "$script" supervise "$@" </dev/null >>"$state/log" 2>&1 9>&-
    until [[ -s $state/pid ]]; do sleep 0.1; done
  fi
  exec 9>&-
  tail --lines=100 --follow --sleep-interval=0.5 --pid="$(cat "$state/pid")" "$state/log"
  for _ in {1..50}; do
    [[ ! -e $state/exit_code ]] || exit "$(cat "$state/exit_code")"
    sleep 0.1
  done
  exit 137 # whatever killed it left no exit code
}

stop() {
  if running; then
    kill -TERM "$(cat "$state/pid")"
    while running; do sleep 0.5; done
  fi
  status
}

status() {
  if running; then
    echo running
  elif [[ -e $state/exit_code ]]; then
    echo "ended with exit code $(cat "$state/exit_code")"
  else
    echo "nothing was run"
  fi
}

case ${1:-} in
install | run | stop | status | supervise) "$@" ;;
*)
  echo "error: worker.sh knows install, run, stop and status, not '${1:-}'." >&2
  exit 1
  ;;
esac
