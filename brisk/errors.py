"""What a person got wrong, told in one line."""

import difflib
import os
import re
import sys
from contextlib import contextmanager

LONGEST = 1000  # characters of an error's line


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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no text at all
    try:
        yield
    except (UserError, RunError) as error:  # under torchrun all meet it: one line for a machine
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        leave_with(str(error), speaks, status=2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # what the system refuses, wherever it was asked
        leave_with(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        leave_with(f"there is not enough memory for this; take smaller sizes ({error})")


def leave_with(text, speaks=True, status=2):
    if speaks:
        print(f"error: {one_line(text)}", file=sys.stderr)
    sys.exit(status)


def note(text):
    """Print one line on standard error; `text` may quote names of files."""
    print(one_line(text), file=sys.stderr)


def is_out_of_memory(error):
    """Python's and numpy's error, or PyTorch's, which on a CPU is a `RuntimeError` like others."""
    return isinstance(error, MemoryError) or "allocate" in str(error)


def one_line(text):
    """`text` on one line: without what would steer a terminal, its middle left out where it is
    long. It may quote what came from a file or a command line."""
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def without_controls(text):
    """`text` with U+FFFD for control characters, except newline and tab. A terminal would obey
    them: move the cursor, clear the screen, set the title (ECMA-48; ESC alone begins most)."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def did_you_mean(word, known):
    """`; did you mean …?` with the known word nearest to `word`, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    match = match or [key for key in known if len(word) > 3 and str(key).startswith(word)]
    return f"; did you mean {match[0]}?" if match else ""


def format_bytes(number):
    """`number` of bytes in MB or GB, to two or three digits."""
    return f"{number / 1e6:.0f} MB" if number < 1e9 else f"{number / 1e9:.1f} GB"
