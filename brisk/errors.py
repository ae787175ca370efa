"""One-line error messages."""

import difflib
import os
import re
import sys
from contextlib import contextmanager

MAX_LENGTH = 1000  # characters in the line of an error


class UserError(Exception):
    """Wrong input. The text is one line: the problem, where it is, and how to fix it. Scripts end
    with status 2.

    Programming errors raise ValueError and the like, with a traceback.
    """


class RunError(Exception):
    """A run that failed without wrong input: non-finite numbers, a lost rank, a full disk at the
    last save. The text is one line. Scripts end with status 1."""


@contextmanager
def one_line_errors():
    """A context for a script's `main` that turns exceptions into one line on standard error and an
    exit status: 2 for a `UserError` or OSError, 1 for a `RunError`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may not be valid text
    try:
        yield
    except (UserError, RunError) as error:  # under torchrun on all ranks: one line for each node
        prints = os.environ.get("LOCAL_RANK", "0") == "0"
        exit_with(str(error), prints, status=2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`
        discard_stdout()
    except OSError as error:
        exit_with(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with(f"not enough memory; use smaller sizes ({error})")


def discard_stdout():
    """Send what is printed from here on, and what is still buffered, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_with(text, prints=True, status=2):
    if prints:
        print(f"error: {one_line(text)}", file=sys.stderr)
    sys.exit(status)


def note(text):
    """Print `text`, which may quote file names, on one line of standard error."""
    print(one_line(text), file=sys.stderr)


def is_out_of_memory(error):
    """Whether `error` is out of memory: a MemoryError, or on a CPU a RuntimeError of PyTorch."""
    return isinstance(error, MemoryError) or "allocate" in str(error)


def one_line(text):
    """`text`, possibly from a file, on one line that is safe to print: without control characters,
    and shortened in the middle to `MAX_LENGTH`."""
    line = " ".join(text.split())
    if len(line) > MAX_LENGTH:
        line = f"{line[: MAX_LENGTH // 2]} … {line[-MAX_LENGTH // 2 :]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def without_controls(text):
    """`text` with U+FFFD for control characters except newline and tab. A terminal would act on
    them: move the cursor, clear the screen, set the title (ECMA-48)."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def did_you_mean(word, known):
    """`; did you mean …?` with the closest known word, or ""."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    match = match or [key for key in known if len(word) > 3 and str(key).startswith(word)]
    return f"; did you mean {match[0]}?" if match else ""


def format_bytes(number):
    """Format a `number` of bytes in MB or GB."""
    return f"{number / 1e6:.0f} MB" if number < 1e9 else f"{number / 1e9:.1f} GB"
