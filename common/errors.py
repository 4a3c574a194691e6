"""What a user can mend becomes one line on stderr and exit status 2."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UsageError(Exception):
    """Bad flag, data, checkpoint or directory. The message says what is wrong and what to do."""


@contextmanager
def exit_status() -> Iterator[None]:
    """End the process as a script should: 2 and one line for what a user can mend, 130 after Ctrl-C."""
    try:
        yield
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a directory without permission
        if error.errno not in MENDABLE:
            raise
        print(f"error: {error.filename or 'writing results'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
