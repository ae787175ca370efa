"""A person types prompts, one a line, and between them commands that change settings.

`converse` reads the lines, obeys the commands and says what is wrong with one; what a prompt or a
new value means is the script's to say. Standard output is left to the text: what is said here
goes to standard error. Lines from a pipe are read the same, without a sign to ask for them.
"""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

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
        change: `change(config, key, text)` returns a `config` with that value, or raises
            `UserError`.
        answer: `answer(config, prompt, first)` writes the samples after a prompt, numbered from
            `first`; a `UserError` says that there are none.
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
                    prompt = line.removeprefix("/") if line.startswith("//") else line
                    answer(config, prompt, first)
                except UserError:
                    number = first
                    raise
            elif command[1] == "quit":
                return
            else:
                changed = obey(command, config, keys, change)
                if command[1] == "seed" and changed is not config:
                    number = 0
                config = changed
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
    """Do what a matched command says. Returns the settings after it."""
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
        return change(config, name, value)
    else:
        say(f"{name}={getattr(config, name)}")
    return config


def say(text):
    print(text, file=sys.stderr, flush=True)


def read_prompts(path):
    """The lines of a file, each a prompt; blank ones are passed over."""
    prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt in it; write one a line")
    return prompts


def read_prompt(start):
    """`start`, or the text of the file that it names with FILE: in front."""
    return read_text(start.removeprefix("FILE:")) if start.startswith("FILE:") else start


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or what is no path at all
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the prompt in {path}: {reason}") from error


def open_new(path):
    """A file for bytes, without a buffer. It must be new or empty: nothing is overwritten."""
    try:
        file = open(path, "ab", buffering=0)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the samples to {path}: {reason}") from error
    if os.fstat(file.fileno()).st_size > 0:
        file.close()
        raise UserError(f"out={path} is there already; name a new file, or remove that one first")
    return file


def write_sample(file, prompt, number, text, settings):
    """Append a line for the sample `text` with this `number`, drawn after `prompt` with the
    `settings` (a dict). A line is one write: in the file whole, or not."""
    record = {"prompt": prompt, "text": text, "sample": number, **settings}
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    try:
        written = file.write(line)
    except OSError as error:
        raise UserError(f"cannot write to {file.name}: {error.strerror}") from error
    if written < len(line):
        raise UserError(f"cannot write to {file.name}: the disk is full")
