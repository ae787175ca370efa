"""Export a checkpoint as a Hugging Face directory, or as a GGUF file for llama.cpp.

    $ python export.py --out_dir=out-demo --to=my-model
    $ python export.py --init_from=gpt2 --to=gpt2-again --gguf=gpt2.gguf --gguf_dtype=q8_0

The directory has the weights in float32 and the tokenizer, for `transformers`: a classic model as
GPT2LMHeadModel, a modern one (rotary positions, RMS norm, qk_norm, SwiGLU, no biases) as
Qwen3ForCausalLM. The GGUF file has both in one, in float32, float16 or q8_0. A model or tokenizer
that cannot be converted exactly is an error, and nothing is written. An existing target is replaced
only if it is an earlier export and --overwrite is given.
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
    init_from: str = "resume"  # resume, gpt2*, a checkpoint, or a Hugging Face folder
    out_dir: str = "out"  # folder of the run, for init_from=resume; ckpt.pt is read, else last.pt
    to: str = ""  # Hugging Face directory to write
    gguf: str = ""  # GGUF file to write
    gguf_dtype: Literal["float32", "float16", "q8_0"] = "float32"  # type of the matrices in it
    overwrite: bool = False  # replace an earlier export


def main(config):
    if not config.to and not config.gguf:
        raise UserError("no target; use --to=DIRECTORY, --gguf=FILE, or both")
    if config.to and os.path.abspath(config.to) == os.path.abspath(config.gguf):
        raise UserError(f"--to and --gguf both name {config.to}")
    for text, is_ours in ((config.to, is_export), (config.gguf, is_gguf_export)):
        if text:  # before the model is loaded
            check_target(Path(text), is_ours, config.overwrite)
    start = read_pretrained(config.init_from, config.out_dir)
    model, tokenizer = GPT.from_checkpoint(start.checkpoint), start.tokenizer
    theirs, weights = to_hugging_face(model.config, model.state_dict(), tokenizer.vocab_size)
    # raise all errors about the model and the tokenizer before anything is written
    files = directory_files(theirs, tokenizer) if config.to else {}
    fields = gguf_fields(theirs, weights, tokenizer, config.gguf_dtype) if config.gguf else []
    parameters = sum(weight.numel() for weight in weights.values())
    size = f"{parameters / 1e6:.2f}M parameters, {tokenizer.vocab_size:,} tokens"
    print(f"{theirs['architectures'][0]}, {size}")
    if config.to:
        with atomic_write(Path(config.to)) as folder:
            folder.mkdir()
            write_directory(folder, files, weights)
        print(f"wrote {config.to} in float32")
    if config.gguf:
        with atomic_write(Path(config.gguf)) as file:
            write_gguf(file, theirs, weights, fields, config.gguf_dtype)
        print(f"wrote {config.gguf} in {config.gguf_dtype}")
    if tokenizer.eot is None:
        print("note: the model has no end-of-text token, so a text never ends by itself")
    elif knows_documents(start.settings.get("rows"), tokenizer):
        print(f"note: the model was trained on documents; begin each prompt with {EOT}")


def check_target(target, is_ours, overwrite):
    """Raise `UserError` unless `target` does not exist, or is an earlier export to overwrite."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_ours(target):
        raise UserError(f"{target} exists and is not an unchanged export; name a new one")
    if not overwrite:
        raise UserError(f"{target} is an earlier export; replace it with --overwrite")


@contextmanager
def atomic_write(target):
    """A context with a temporary path, which replaces `target` at its end unless it raises."""
    try:
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: an invalid path
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
