"""A person types prompts, one a line, and between them commands that change settings.

`converse` reads the lines, obeys the commands and says what is wrong with one; what a prompt or a
new value means is the script's to say. Standard output is left to the text: what is said here
goes to standard error. Lines from a pipe are read the same, without a sign to ask for them.
"""

import re
import sys
from contextlib import suppress

from brisk.errors import UserError, did_you_mean, one_line

HELP = """\
Type a prompt and press enter. FILE:prompt.txt takes it from a file, an empty line is none at
all, and one that begins with / is written with two: //
Ctrl-C stops a text (or clears the line); Ctrl-D leaves, on Windows Ctrl-Z and enter.

  /settings   what is set
  /help       this
  /quit       leave
  /KEY VALUE  changes a setting (/KEY alone shows it, /KEY= empties it). The keys, as they are now:
{keys}

A text depends on the seed and its number, counted from 0. A prompt takes the next numbers, so
that the same one again gives another text; after /seed they begin at 0 again."""


def converse(config, keys, change, answer):
    """Answer lines of standard input until it ends, or until /quit.

    Args:
        config: has the values of `keys` as attributes, num_samples among them.
        keys: what commands may change, {name: what it is, for a person}.
        change: `change(key, text)` sets one in `config`, or raises `UserError`.
        answer: `answer(prompt, first)` writes the samples after a prompt, numbered from `first`;
            a `UserError` says that there are none.
    """
    with suppress(ImportError):  # Windows has none, and its console edits lines by itself
        import readline  # gives `input` the arrow keys and a history

        for option in ("convert-meta off", "input-meta on", "output-meta on"):
            readline.parse_and_bind(f"set {option}")  # UTF-8 passes in the C locale too
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        say("Type a prompt; /help lists the commands, /quit leaves.")
    number = 0
    while True:
        try:
            line = ask("> " if at_terminal else "")
            command = re.fullmatch(r"/(?!/)([^\s=]*)\s*(=?)(.*)", line)
            if not command:
                first, number = number, number + config.num_samples
                try:
                    answer(line.removeprefix("/") if line.startswith("//") else line, first)
                except UserError:
                    number = first
                    raise
            elif command[1] == "quit":
                return
            elif obey(command, config, keys, change) == "seed":
                number = 0
        except UserError as error:
            say(f"error: {one_line(str(error))}")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise


def ask(sign):
    """One line, without its end. Raises `EOFError` after the last."""
    if sign and not sys.stdout.isatty():  # `input` would write it among the text
        print(sign, end="", file=sys.stderr, flush=True)
        sign = ""
    try:
        line = input(sign)
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            say("")  # what comes next begins a line
        raise
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("that line is not UTF-8") from error
    return line


def obey(command, config, keys, change):
    """Do what a matched command says; the key it changed, or None."""
    name, value = command[1].replace("-", "_"), command[3].strip()
    if name == "help":
        about = [f"/{key} {getattr(config, key)}" for key in keys]
        lines = [f"  {a:<21} {keys[key]}" for a, key in zip(about, keys, strict=True)]
        say(HELP.format(keys="\n".join(lines)))
    elif name == "settings":
        say("  ".join(f"{key}={getattr(config, key)}" for key in keys))
    elif name not in keys:
        near = did_you_mean(
            f"/{name}", [f"/{known}" for known in [*keys, "settings", "help", "quit"]]
        )
        raise UserError(
            f"unknown command /{command[1]}{near} (/help lists them; // begins a prompt with /)"
        )
    elif value or command[2]:
        change(name, value)
        return name
    else:
        say(f"{name}={getattr(config, name)}")


def say(text):
    print(text, file=sys.stderr, flush=True)
