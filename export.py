"""A checkpoint for other programs: a Hugging Face directory, or a GGUF file for llama.cpp.

    $ python export.py --out_dir=out-python-source --to=my-model
    $ python export.py --init_from=gpt2 --to=gpt2-again --gguf=gpt2.gguf --gguf_dtype=q8_0

The directory is what `transformers` and what builds on it load: a classic model as
GPT2LMHeadModel, a modern one (rotary positions, RMSNorm, qk_norm, SwiGLU, no biases) as
Qwen3ForCausalLM, with its tokenizer, in float32. The GGUF file holds all of it in one, in float32,
float16 or q8_0. A model or tokenizer that cannot be written so that it computes the same is
refused, and then nothing is written. What was there before is kept, unless it is an earlier export
and --overwrite is given.
"""

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from brisk.data.tokenizer import EOT, knows_documents
from brisk.errors import UserError, one_line_errors
from brisk.interop.gguf import gguf_fields, is_gguf_export, write_gguf
from brisk.interop.huggingface import (
    directory_files,
    is_export,
    to_hugging_face,
    write_directory,
)
from brisk.interop.pretrained import read_pretrained
from configurator import configure
from model import GPT


@dataclass
class ExportConfig:
    init_from: str = "resume"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a directory, a file
    out_dir: str = "out"  # the run whose ckpt.pt is read, else last.pt, with init_from=resume
    to: str = ""  # write a Hugging Face directory here
    gguf: str = ""  # write a GGUF file here
    gguf_dtype: Literal["float32", "float16", "q8_0"] = "float32"  # type of the matrices in it
    overwrite: bool = False  # replace what an earlier export wrote there


def main(config):
    if not config.to and not config.gguf:
        raise UserError("name what to write: --to=DIRECTORY, --gguf=FILE, or both")
    if config.to and os.path.abspath(config.to) == os.path.abspath(config.gguf):
        raise UserError(f"--to and --gguf both name {config.to}")
    for text, is_ours in ((config.to, is_export), (config.gguf, is_gguf_export)):
        if text:  # a mistake in these should cost no waiting
            check_target(Path(text), is_ours, config.overwrite)
    start = read_pretrained(config.init_from, config.out_dir)
    model, tokenizer = GPT.from_checkpoint(start.checkpoint), start.tokenizer
    theirs, weights = to_hugging_face(model.config, model.state_dict(), tokenizer.vocab_size)
    # All that can be refused is refused here, before anything is written.
    files = directory_files(theirs, tokenizer) if config.to else {}
    fields = gguf_fields(theirs, weights, tokenizer, config.gguf_dtype) if config.gguf else []
    parameters = sum(weight.numel() for weight in weights.values())
    size = f"{parameters / 1e6:.2f}M parameters, {tokenizer.vocab_size:,} tokens"
    print(f"{theirs['architectures'][0]}, {size}")
    if config.to:
        with moved_in(Path(config.to)) as folder:
            folder.mkdir()
            write_directory(folder, files, weights)
        print(f"wrote {config.to} in float32")
    if config.gguf:
        with moved_in(Path(config.gguf)) as file:
            write_gguf(file, theirs, weights, fields, config.gguf_dtype)
        print(f"wrote {config.gguf} in {config.gguf_dtype}")
    if tokenizer.eot is None:
        print("note: it has no end of text; a text goes on for as many tokens as are asked for")
    elif knows_documents(start.settings.get("rows"), tokenizer):
        print(f"note: it learned documents from their start; begin each prompt with {EOT}")


def check_target(target, is_ours, overwrite):
    """Raise `UserError` unless `target` is free, or an earlier export that may be replaced."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_ours(target):
        raise UserError(f"{target} is there and is no export as it was written; name a new one")
    if not overwrite:
        raise UserError(f"{target} holds an earlier export; --overwrite replaces it")


@contextmanager
def moved_in(target):
    """A path to write to, which becomes `target` when all went well; else nothing changes."""
    try:
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: what is no path at all
        raise UserError(f"could not write {target}: {error}") from error
    try:
        with TemporaryDirectory(prefix=f"{target.name}.writing-", dir=target.parent) as room:
            new, before = Path(room, "new"), Path(room, "before")
            yield new
            if target.exists():
                os.replace(target, before)
            try:
                os.replace(new, target)
            except OSError:
                if before.exists():
                    os.replace(before, target)
                raise
    except OSError as error:
        raise UserError(f"could not write {target}: {error.strerror or error}") from error


if __name__ == "__main__":
    with one_line_errors():
        main(configure(ExportConfig, sys.argv[1:]))
