"""Text from a checkpoint, from GPT-2, or from a Hugging Face directory.

    $ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    $ python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5
    $ python sample.py --start=FILE:prompt.txt --stop="<|endoftext|>" --temperature=0
    $ python sample.py --prompts=prompts.txt --max_words=50 --out=samples.jsonl
    $ python sample.py --start="The answer is" --top_next=10
    $ python sample.py --interactive

Standard output is the text alone, a sample begun with its prompt and ended by a line of dashes;
notices go to standard error. The samples are drawn side by side, those of different prompts too,
as many as TOKENS_AT_ONCE allows: the first of a batch is shown as its tokens come, the others
follow whole. A sample's
text depends on the seed and its number, not on how many are drawn with it; the number counts the
samples of one prompt, with --interactive those of the session.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_type_hints

import torch

from brisk.data.tokenizer import EOT, knows_documents
from brisk.device import open_device, resolve_compile
from brisk.errors import UserError, one_line_errors, without_controls
from brisk.generation.repl import converse, open_new, read_prompt, read_prompts, write_sample
from brisk.generation.text_stream import TextStream
from brisk.generation.top_tokens import as_table, top_next_tokens
from brisk.interop.pretrained import read_pretrained
from configurator import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    UnitFloat,
    checked,
    configure,
    help_lines,
    parsed,
    with_values,
)
from model import GPT

TOKENS_AT_ONCE = 32768  # in the windows of a batch: bounds its memory, to 32 times 1024 tokens
CACHE_BYTES = 4 * 2**30  # of keys and values of a batch, in float32
TOKENS_A_WORD = 32  # at the most, and rarely: the budget of a sample that max_words ends
MOST_TOKENS = 10**7  # of one sample
DASHES = "---------------"
# What makes a text what it is: --out records these, and --interactive has commands for them.
SHAPING = ("temperature", "top_k", "top_p", "max_new_tokens", "max_words", "stop", "seed")
ORIGIN = ("init_from", "out_dir")


@dataclass(frozen=True)
class SampleConfig:
    init_from: str = "resume"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a directory, a file
    out_dir: str = "out"  # the run whose best checkpoint is taken, with init_from=resume
    start: str = ""  # the prompt, or FILE:prompt.txt; none means a newline (or end of text)
    prompts: str = ""  # a file of prompts instead, one a line; blank lines are passed over
    interactive: bool = False  # type prompts and see the text as it comes; /help is there
    num_samples: PositiveInt = 10  # samples to draw after each prompt; interactive: 1
    max_new_tokens: Annotated[int, (0, MOST_TOKENS)] = 500  # tokens drawn in each sample
    max_words: NonNegativeInt = 0  # a sample ends after so many words, never in one; 0: no limit
    temperature: NonNegativeFloat = 0.8  # below 1 less random, above 1 more, 0 the likeliest token
    top_k: NonNegativeInt = 200  # draw among the k likeliest tokens; 0 means all
    top_p: UnitFloat = 1.0  # draw among the fewest tokens that reach this probability; 1 means all
    exact_window: bool = False  # past block_size see all of it, not half and more; much slower
    rows: Literal["auto", "windows", "documents"] = "auto"  # text goes on, or ends as documents do
    stop: str = ""  # a sample ends before this text, which is not shown; <|endoftext|> too
    seed: Seed = 1337  # the same seed gives the same text
    top_next: NonNegativeInt = 0  # instead of samples, the n likeliest next tokens
    out: str = ""  # write prompts and samples to this new file too, one JSON object a line
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the products
    compile: bool | Literal["auto"] = False  # compile the blocks: a slow start, then faster
    given: tuple = field(default=(), compare=False)  # names of the keys that were set, in order


def main(config):
    sys.stdout.reconfigure(encoding="utf-8")  # elsewhere than on Windows it is that already
    prompts, out = before_loading(config)
    if config.interactive and "num_samples" not in config.given:
        config = replace(config, num_samples=1)
    with redirect_stdout(sys.stderr):
        device = open_device(config.device, config.dtype)
        start = read_pretrained(config.init_from, config.out_dir)
        model, tokenizer = GPT.from_checkpoint(start.checkpoint), start.tokenizer
        model.to(device.device)
        if resolve_compile(config.compile, device):
            for block in model.transformer.h:
                block.compile()
        print(f"{model.get_num_params() / 1e6:.2f}M parameters on {device}")
    rows = start.settings.get("rows") if config.rows == "auto" else config.rows
    documents = knows_documents(rows, tokenizer) and config.rows != "windows"
    if config.rows == "documents" and not documents:
        raise UserError("rows=documents: this tokenizer has no end of text")
    unk = tokenizer.unk
    drawable = {"vocab_size": tokenizer.vocab_size, "suppress": () if unk is None else (unk,)}
    check_stop(config.stop, tokenizer)
    for number, text in enumerate(prompts, 1):  # all of them before the first is answered
        try:
            encode_prompt(text, tokenizer, documents)
        except UserError as error:
            where = f"{config.prompts}, prompt {number}: " if config.prompts else ""
            raise UserError(f"{where}{error}") from error

    def answer(config, texts, first=0):
        """Write what the model says after each of `texts`, in samples numbered from `first`."""
        samples = []
        for text in texts:
            ids, shown = encode_prompt(text, tokenizer, documents)
            if unknown := ids.tolist().count(unk):
                print(f"note: the model does not know {unknown} of the words", file=sys.stderr)
            ids = ids.to(device.device)
            if config.top_next:
                top = top_next_tokens(model, ids[None], config.top_next, **drawable)
                print(as_table(*top, tokenizer), DASHES, sep="\n", flush=True)
                continue
            numbers = range(first, first + config.num_samples)
            samples += [Sample(text, ids, shown, number) for number in numbers]
        ends_by_id = documents or config.stop == EOT
        stops = "" if config.stop == EOT else config.stop, [tokenizer.eot] if ends_by_id else []
        for batch in batches(samples, token_budget(config), model.config):
            streams = [TextStream(tokenizer, *stops, config.max_words) for _ in batch]
            drawn = print_samples(model, batch, streams, drawable, config)
            if out:
                settings = {key: getattr(config, key) for key in (*SHAPING, *ORIGIN)}
                for sample, text in zip(batch, drawn, strict=True):
                    write_sample(out, sample.prompt, sample.number, text, settings)

    def change(config, key, text):
        """The settings with the value of a key that a person typed."""
        kind = get_type_hints(SampleConfig, include_extras=True)[key]
        value = checked(parsed(text, kind), kind, key, "here")
        if key == "stop":
            check_stop(value, tokenizer)
        return with_values(config, {key: value})

    with device.autocast():
        answer(config, prompts)
        if config.interactive:
            about = help_lines(SampleConfig)
            keys = {key: about[key] for key in (*SHAPING, "num_samples", "top_next")}
            converse(
                config,
                keys,
                change,
                lambda config, line, first: answer(config, [read_prompt(line)], first),
            )


@dataclass
class Sample:
    """One text to be drawn."""

    prompt: str
    ids: torch.Tensor  # of the prompt, (T,)
    shown: str  # the prompt as it is printed
    number: int  # among the samples of the prompt


def batches(samples, budget, sizes):
    """`samples` in order, in lists of those to be drawn side by side, `budget` tokens at most
    each, by a model of `sizes`: as many as have room when all are as long as the longest."""
    cached = 8 * sizes.n_layer * sizes.kv_heads * sizes.head_dim  # bytes: a key and a value a layer
    room = min(TOKENS_AT_ONCE, CACHE_BYTES // cached)
    batch, longest = [], 0
    for sample in samples:
        window = min(len(sample.ids) + budget, sizes.block_size)
        if batch and (len(batch) + 1) * max(longest, window) > room:
            yield batch
            batch, longest = [], 0
        batch.append(sample)
        longest = max(longest, window)
    if batch:
        yield batch


def before_loading(config):
    """The prompts, and the file for samples or None: mistakes in these should cost no waiting."""
    if (config.start != "") + (config.prompts != "") + config.interactive > 1:
        raise UserError("start, prompts and interactive exclude each other: give one of them")
    if config.out and config.top_next and not config.interactive:
        raise UserError("top_next draws no samples for out: leave one of them out")
    prompts = read_prompts(config.prompts) if config.prompts else [read_prompt(config.start)]
    out = open_new(config.out) if config.out else None
    return [] if config.interactive else prompts, out


def encode_prompt(text, tokenizer, documents):
    """Ids (T,) of the prompt, T at least 1, and the text to show of it. A model of `documents`
    reads the end of the one before in front of it."""
    try:
        ids = tokenizer.encode(text or "\n", allow_eot=True).tolist()
    except UserError:
        if text:
            raise
        ids = []  # it knows no newline
    if documents:
        ids = [tokenizer.eot, *ids] if text else [tokenizer.eot]
        return torch.tensor(ids), tokenizer.decode(ids[1:])
    ids = ids or [tokenizer.eot or 0]
    return torch.tensor(ids), tokenizer.decode(ids)


def check_stop(stop, tokenizer):
    if stop == EOT and tokenizer.eot is None:
        raise UserError(f"stop={EOT}: this tokenizer has no end of text; leave stop out")


def token_budget(config):
    """The most tokens to draw in a sample; with max_words alone, those end it long before."""
    if config.max_words and "max_new_tokens" not in config.given:
        return min(TOKENS_A_WORD * config.max_words, MOST_TOKENS)
    return config.max_new_tokens


def print_samples(model, samples, streams, drawable, config):
    """Draw the `samples` side by side, with a stream for each. Print each after its prompt; return
    what was drawn of each, as text."""
    drawn = [""] * len(streams)

    def on_token(step, ids):
        pieces = [stream.feed(i) for stream, i in zip(streams, ids.tolist(), strict=True)]
        drawn[:] = [text + piece for text, piece in zip(drawn, pieces, strict=True)]
        show(pieces[0], end="")
        return all(stream.stopped for stream in streams)

    show(samples[0].shown, end="")
    try:
        model.generate(
            [sample.ids for sample in samples],
            token_budget(config),
            config.temperature,
            config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            samples=[sample.number for sample in samples],
            on_token=on_token,
            exact_window=config.exact_window,
            **drawable,
        )
    except KeyboardInterrupt:
        print(flush=True)  # what comes next begins a line
        raise
    rests = [stream.finish() for stream in streams]
    drawn = [text + rest for text, rest in zip(drawn, rests, strict=True)]
    show(f"{rests[0]}\n{DASHES}")
    for sample, text in zip(samples[1:], drawn[1:], strict=True):
        show(f"{sample.shown}{text}\n{DASHES}")
    return drawn


def show(text, end="\n"):
    """Print `text` as it is to a file or a pipe, without control characters to a terminal."""
    print(without_controls(text) if sys.stdout.isatty() else text, end=end, flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(SampleConfig, sys.argv[1:]))
