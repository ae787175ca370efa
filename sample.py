"""Text from a checkpoint, from GPT-2, or from a Hugging Face directory.

    $ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    $ python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5
    $ python sample.py --start=FILE:prompt.txt --stop="<|endoftext|>" --temperature=0

Standard output is the text alone, a sample begun with its prompt and ended by a line of dashes;
notices go to standard error. The samples are drawn side by side, as many as TOKENS_AT_ONCE
allows: the first of a batch is shown as its tokens come, the others follow whole. A sample's
text depends on the seed and its number, not on how many are drawn with it.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from brisk.checkpoint import best_checkpoint, load_checkpoint
from brisk.corpus import load_tokenizer
from brisk.device import open_device, resolve_compile
from brisk.errors import UserError, nearest, one_line_errors
from brisk.generation import TextStream
from brisk.huggingface import GPT2_NAMES
from brisk.tokenizer import EOT, from_dict, gpt2
from configurator import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    UnitFloat,
    configure,
)
from model import GPT

TOKENS_AT_ONCE = 32768  # in the windows of a batch: bounds its memory, to 32 times 1024 tokens


@dataclass
class SampleConfig:
    init_from: str = "resume"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a directory, a file
    out_dir: str = "out"  # the run whose best checkpoint is taken, with init_from=resume
    start: str = ""  # the prompt, or FILE:prompt.txt; none means a newline (or end of text)
    num_samples: PositiveInt = 10  # samples to draw
    max_new_tokens: Annotated[int, (0, 10**7)] = 500  # tokens drawn in each sample
    temperature: NonNegativeFloat = 0.8  # below 1 less random, above 1 more, 0 the likeliest token
    top_k: NonNegativeInt = 200  # draw among the k likeliest tokens; 0 means all
    top_p: UnitFloat = 1.0  # draw among the fewest tokens that reach this probability; 1 means all
    stop: str = ""  # a sample ends before this text, which is not shown; <|endoftext|> too
    seed: Seed = 1337  # the same seed gives the same text
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the products
    compile: bool | Literal["auto"] = False  # compile the blocks: a slow start, then faster


def main(config):
    sys.stdout.reconfigure(encoding="utf-8")  # elsewhere than on Windows it is that already
    with redirect_stdout(sys.stderr):
        device = open_device(config.device, config.dtype)
        model, tokenizer, trained_with = load(config)
        model.to(device.device)
        if resolve_compile(config.compile, device):
            for block in model.transformer.h:
                block.compile()
        print(f"{model.get_num_params() / 1e6:.2f}M parameters on {device}")

    prompt = encode_prompt(config.start, tokenizer)
    shown = tokenizer.decode(prompt[0])
    if trained_with.get("rows") == "documents":  # then the model knows how documents begin and end
        config.stop = config.stop or EOT
        if config.start:
            prompt = torch.cat([torch.tensor([[tokenizer.eot]]), prompt], dim=1)
        else:
            prompt, shown = torch.tensor([[tokenizer.eot]]), ""
    if config.stop == EOT and tokenizer.eot is None:
        raise UserError(f"--stop={EOT}: this tokenizer has no end of text; leave --stop out")
    window = min(prompt.size(1) + config.max_new_tokens, model.config.block_size)
    batch_size = max(1, TOKENS_AT_ONCE // window)
    with device.autocast():
        for first in range(0, config.num_samples, batch_size):
            count = min(batch_size, config.num_samples - first)
            write_samples(model, tokenizer, prompt, shown, first, count, config)


def load(config):
    """What `config.init_from` means: the model (on the CPU), its tokenizer, and the settings it
    was trained with (a dict, empty for GPT-2)."""
    source, trained_with = config.init_from, {}
    if source in GPT2_NAMES or Path(source).is_dir():
        print(f"weights of {source}, GPT-2's tokenizer")
        model, tokenizer = GPT.from_pretrained(source), gpt2()
    elif source == "resume" or Path(source).is_file():
        path = best_checkpoint(config.out_dir) if source == "resume" else Path(source)
        checkpoint = load_checkpoint(path)
        print(f"checkpoint {path}, iteration {checkpoint.get('iter_num', 'unknown')}")
        model, tokenizer = GPT.from_checkpoint(checkpoint), tokenizer_of(checkpoint)
        trained_with = checkpoint.get("config", {})
    else:
        names = ["resume", *GPT2_NAMES]
        raise UserError(
            f"init_from={source} is no checkpoint file, no directory and none of "
            f"{', '.join(names)}{nearest(source, names)}"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        mend = "put the data set's meta.json or meta.pkl in its folder"
        raise UserError(f"the tokenizer has {sizes}: they do not belong together; {mend}")
    return model, tokenizer, trained_with


def tokenizer_of(checkpoint):
    """The tokenizer inside a checkpoint, else that of its data set, else GPT-2's."""
    if checkpoint.get("tokenizer"):
        return from_dict(checkpoint["tokenizer"])
    trained_with = checkpoint.get("config", {})
    folders = [trained_with.get("data_dir"), Path("data", trained_with.get("dataset", ""))]
    for folder in filter(None, folders):
        if tokenizer := load_tokenizer(folder):
            print(f"tokenizer of {folder}")
            return tokenizer
    print("No meta.pkl found, assuming GPT-2 encodings...")
    return gpt2()


def encode_prompt(start, tokenizer):
    """Ids (1, T) of the prompt, T at least 1."""
    if start.startswith("FILE:"):
        path = start.removeprefix("FILE:")
        try:
            start = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read the prompt in {path}: {reason}") from error
    try:
        ids = tokenizer.encode(start or "\n", allow_eot=True).tolist()
    except UserError:
        if start:
            raise
        ids = []  # it knows no newline
    return torch.tensor([ids or [tokenizer.eot or 0]])


def write_samples(model, tokenizer, prompt, shown, first, count, config):
    """Draw the samples from number `first` on, `count` of them side by side, and print each after
    the prompt as it is `shown`."""
    by_id = config.stop == EOT
    stop_text, stop_ids = ("", [tokenizer.eot]) if by_id else (config.stop, [])
    streams = [TextStream(tokenizer, stop_text, stop_ids) for _ in range(count)]
    texts = [shown] * count

    def on_token(step, ids):
        pieces = [stream.feed(i) for stream, i in zip(streams, ids.tolist(), strict=True)]
        texts[:] = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        print(pieces[0], end="", flush=True)
        return all(stream.stopped for stream in streams)

    print(texts[0], end="", flush=True)
    model.generate(
        prompt.repeat(count, 1).to(next(model.parameters()).device),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        top_p=config.top_p,
        vocab_size=tokenizer.vocab_size,
        seed=config.seed,
        first_sample=first,
        on_token=on_token,
    )
    print(streams[0].finish())
    print("---------------")
    for stream, text in zip(streams[1:], texts[1:], strict=True):
        print(text + stream.finish())
        print("---------------")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(SampleConfig, sys.argv[1:]))
