"""The one exception for what a user can mend: it becomes one line on stderr and exit status 2."""


class UsageError(Exception):
    """Bad flag, data, checkpoint or directory. The message says what is wrong and what to do."""
