"""What a person got wrong, told in one line."""

import difflib
import os
import sys
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the person at the keyboard can mend.

    Its text is one line that names what is wrong, where, and the mend. Mistakes only a
    programmer can make raise `ValueError` and its kin instead, with their traceback.
    """


class RunError(Exception):
    """What went wrong with a run by nobody's mistake: its numbers, or its disk at the very end.

    One line too, but status 1.
    """


@contextmanager
def one_line_errors():
    """Around a script's `main`: a `UserError` becomes one line on standard error, status 2, a
    `RunError` one with status 1."""
    try:
        yield
    except (UserError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun one line for a machine
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def nearest(word, known):
    """`; did you mean …?` with the known word nearest to `word`, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    match = match or [key for key in known if len(word) > 3 and str(key).startswith(word)]
    return f"; did you mean {match[0]}?" if match else ""
