"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a flag, config, file or checkpoint.

    Its message is one clear sentence that names the thing and the remedy. The command line prints it and exits with
    code 1, without a traceback; every other exception is a bug.
    """


class Interrupted(UserError):
    """What ended a run is no mistake and may pass, such as a lost network; the exit code makes launchers repeat it."""


def reason_of(error: BaseException) -> str:
    """What a library's error, or the one that caused it, says, in one line of at most 200 characters."""
    return " ".join(str(error.__cause__ or error).split())[:200]
