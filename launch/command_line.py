"""What the launchers have in common: their flags, the trainer's command, and running or printing commands."""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from launch.cluster_file import LaunchError, check_name, read

TRAINING = ("launch", "resume", "run")  # the commands that the trainer's arguments go with
CLONE = str(pathlib.Path(__file__).resolve().parents[1])


def parse(
    module: str, doc: str, kind: type, commands: dict[str, str], argv: Sequence[str]
) -> tuple[argparse.Namespace, Any]:
    """The flags and the cluster of a launcher's command line; `trainer` holds what follows `--`.

    `commands` are the launcher's, with a sentence about each.

    Raises:
        LaunchError: if a flag, the name or the cluster's file is wrong.
    """
    own, trainer = list(argv), []
    if "--" in own:
        own, trainer = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        epilog="\n".join(["commands:", *(f"  {name:8} {text}" for name, text in commands.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.error = lambda message: _refuse(f"{message}; --help lists commands and flags.")  # type: ignore[assignment]
    parser.add_argument("command", choices=commands, help="what to do")
    parser.add_argument("--cluster", required=True, help="the cluster's TOML file")
    parser.add_argument("--name", required=True, help="of the run: its folder, its job")
    parser.add_argument("--dry_run", action="store_true", help="print every command and manifest, run nothing")
    flags = parser.parse_args(own)
    flags.trainer = trainer
    if trainer and flags.command not in TRAINING:
        raise LaunchError(f"The command {flags.command} trains nothing; leave out -- and what follows it.")
    check_name(flags.name)
    return flags, read(kind, flags.cluster)


def _refuse(message: str) -> None:
    raise LaunchError(message)


def trainer_command(python: str, runs: str, name: str, arguments: Sequence[str], env: dict[str, str]) -> list[str]:
    """The command that trains a run in a folder of `runs`, with environment variables.

    Raises:
        LaunchError: if the arguments name no config, or what the launcher decides.
    """
    if not any(argument.startswith("--config=") for argument in arguments):
        raise LaunchError("The trainer's config is missing; end the command with -- --config=configs/NAME.py.")
    decided = {
        "--workdir": "the workdir is the cluster file's `runs` and --name",
        "--coordinator": "processes find each other",
        "--num_processes": "processes find each other",
        "--process_id": "processes find each other",
    }
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in decided:
            raise LaunchError(f"Leave {flag} out: {decided[flag]}.")
    variables = ["env", *(f"{key}={value}" for key, value in env.items())] if env else []
    return [*variables, python, "-m", "walt_jax.main", f"--workdir={runs.rstrip('/')}/{name}", *arguments]


def execute(command: Sequence[str], dry_run: bool, stdin: str | None = None) -> int:
    """Runs a command, or prints it as a shell reads it; its exit code.

    Raises:
        LaunchError: if the program is not installed.
    """
    if dry_run:
        print(shlex.join(command) + (f" <<'END'\n{stdin}\nEND" if stdin is not None else ""))
        return 0
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
    return _run(command, input=stdin).returncode


def must(command: Sequence[str], dry_run: bool, stdin: str | None = None) -> None:
    """As `execute`.

    Raises:
        LaunchError: if the command fails, too.
    """
    code = execute(command, dry_run, stdin)
    if code:
        raise LaunchError(f"`{shlex.join(command[:4])} …` failed with exit code {code}; its message is above.")


def output(command: Sequence[str]) -> str | None:
    """What a command writes; None if it fails, with its message printed."""
    done = _run(command, stdout=subprocess.PIPE)
    return None if done.returncode else done.stdout


def _run(command: Sequence[str], **how: Any) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, text=True, check=False, **how)
    except FileNotFoundError as error:
        raise LaunchError(f"{command[0]} is not installed here, or not on the PATH; install it.") from error


def manifest(document: dict[str, Any]) -> str:
    """A Kubernetes object as JSON, which is YAML that needs no quoting rules."""
    return json.dumps(document, indent=2)


def main(run: Callable[[Sequence[str]], int]) -> None:
    """Ends the process with what a launcher returns; a LaunchError is one sentence and exit code 1."""
    try:
        sys.exit(run(sys.argv[1:]))
    except (LaunchError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
