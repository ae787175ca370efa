"""Interactive sessions: prompts and commands, typed or from a pipe.

`converse` reads them and carries out the commands; the script draws the texts and checks the values
of settings. Notices go to standard error, so that standard output has the text alone.
"""

import json
import os
import re
import sys
from pathlib import Path

from brisk.errors import UserError, did_you_mean, one_line

COMMANDS = ("continue", "settings", "help", "quit")
HELP = """\
Type a prompt and press Enter. A pasted text is one prompt, with all its lines; to type several
lines, end each but the last with a backslash. FILE:prompt.txt reads the prompt from a file. An
empty line is an empty prompt. A prompt that begins with / is typed with two: //
Ctrl-C stops a text or clears the line. Ctrl-D leaves (on Windows Ctrl-Z and Enter). Tab completes
commands.

  /continue   continue the last text, with the settings as they are now
  /settings   show all settings
  /help       show this
  /quit       leave
  /KEY VALUE  change a setting (/KEY alone shows it, /KEY= empties it); the keys and their values:
{keys}

A text depends on the seed and its number, counted from 0. Each prompt takes the next numbers, so
the same prompt again gives another text. /seed starts again at number 0."""


def converse(config, keys, change, answer):
    """Answer prompts from standard input until it ends, or until /quit.

    Args:
        config: has the values of `keys` as attributes, num_samples among them.
        keys: the settings that commands change, {name: its description}.
        change: `change(config, key, text)` returns a `config` with that value. Raises `UserError`
            for a value that the key does not take.
        answer: `answer(config, prompt, first)` writes the samples of a prompt, numbered from
            `first`. A prompt of None continues the last text. Raises `UserError` if it cannot.
    """
    edit_lines(keys)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        say("Type a prompt; /help lists the commands, /quit leaves.")
    number = 0
    while True:
        try:
            text = read_input(at_terminal)
            command = re.fullmatch(r"/(?!/)([^\s=]*)\s*(=?)(.*)", text, re.DOTALL)
            if command and command[1] == "quit":
                return
            if command and command[1] != "continue":
                changed = obey(command, config, keys, change)
                if command[1] == "seed" and changed is not config:
                    number = 0
                config = changed
            else:
                prompt = None if command else text.removeprefix("/" * text.startswith("//"))
                first, number = number, number + config.num_samples
                try:
                    answer(config, prompt, first)
                except UserError:
                    number = first
                    raise
        except UserError as error:
            say(f"error: {one_line(str(error))}")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise


def edit_lines(keys):
    """Give `input` at a terminal line editing, a history, completion and bracketed paste, by which
    the lines of a pasted text come as one."""
    try:
        import readline
    except ImportError:  # on Windows, whose console edits lines itself
        return
    for option in ("convert-meta off", "input-meta on", "output-meta on"):
        readline.parse_and_bind(f"set {option}")  # UTF-8 passes in the C locale too
    if os.environ.get("TERM", "dumb") != "dumb":  # it takes a sequence that such a one would show
        readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_completer_delims("")  # the word to complete is the whole line
    readline.set_completer(lambda line, i: [*completions(line, keys), None][i])


def completions(line, keys):
    """The lines that `line` may become by Tab: commands, or in a prompt a tab."""
    if not line.startswith("/") or line.startswith("//"):
        return [f"{line}\t"]
    known = [*(f"/{key} " for key in keys), *(f"/{name}" for name in COMMANDS)]
    return [command for command in known if command.startswith(line)]


def read_input(at_terminal):
    """A prompt or a command: a line, and the next ones while they end with a backslash. Raises
    `EOFError` after the last."""
    lines, more = [], True
    while more:
        try:
            line = read_line(("... " if lines else "> ") if at_terminal else "")
        except EOFError:
            if not lines:
                raise
            break
        more = line.endswith("\\")
        lines.append(line.removesuffix("\\"))
    return "\n".join(lines)


def read_line(sign):
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
        near = did_you_mean(f"/{name}", [f"/{known}" for known in [*keys, *COMMANDS]])
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
