"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a flag, config, file or checkpoint.

    Its message is one clear sentence that names the thing and the remedy. The command line prints it and exits with
    code 1, without a traceback; every other exception is a bug.
    """
