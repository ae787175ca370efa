"""Prompts from files, and the samples after them to a file of one JSON object a line."""

import json
import os
from pathlib import Path

from brisk.errors import UserError


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
