"""Runs a command and starts it again after a preemption or a crash.

python -m launch.restart --max_restarts=N --pause_seconds=S -- COMMAND [ARGUMENT ...]

It starts again after exit code 42 (the trainer saved after SIGTERM or SIGINT) and 127 to 255 (crashes); others are
final: 0 means done, 1 a user's mistake. SIGTERM, SIGINT and SIGHUP (a terminal closes) go to the command, which then
has as long as it needs to save, and is not started again.
"""

import argparse
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

PREEMPTED = 42
RESTARTED = frozenset({PREEMPTED, *range(127, 256)})


def supervise(command: Sequence[str], max_restarts: int, pause_seconds: float) -> int:
    """Runs a command until it ends for good, or was started again `max_restarts` times; its last exit code.

    Death by signal n counts as exit code 128 + n, as in a shell.
    """
    stop = threading.Event()
    child: subprocess.Popen | None = None
    early: list[int] = []  # signals that come while the command is started

    def pass_on(number: int, _frame: object) -> None:
        stop.set()
        number = signal.SIGTERM if number == signal.SIGHUP else number
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        for restart in range(max_restarts + 1):
            try:
                # In a group of its own, or a terminal's Ctrl-C would reach it twice.
                child = subprocess.Popen(command, process_group=0)
            except OSError as error:
                print(f"restart: {command[0]} can't be run ({error.strerror})", file=sys.stderr)
                return 1
            for number in early:
                child.send_signal(number)
            code = child.wait()
            code = 128 - code if code < 0 else code
            child = None
            if code not in RESTARTED or stop.is_set():
                return code
            if restart < max_restarts:
                print(
                    f"restart: {'saved' if code == PREEMPTED else 'crashed'} with exit code {code}; restart "
                    f"{restart + 1} of at most {max_restarts} in {pause_seconds:g} s",
                    file=sys.stderr,
                    flush=True,
                )
                if stop.wait(pause_seconds):
                    return code
        print(f"restart: exit code {code} after {max_restarts} restarts; the same command goes on", file=sys.stderr)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str]) -> int:
    """Parses flags; what follows `--` is the command."""
    parser = argparse.ArgumentParser(prog="python -m launch.restart", allow_abbrev=False)
    parser.add_argument("--max_restarts", type=int, required=True)
    parser.add_argument("--pause_seconds", type=float, required=True)
    parser.add_argument("command", nargs="+")
    flags = parser.parse_args(argv)
    return supervise(flags.command, flags.max_restarts, flags.pause_seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
