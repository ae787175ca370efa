"""Text from a checkpoint, from GPT-2, or from a Hugging Face directory.

    $ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    $ python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5
    $ python sample.py --start=FILE:prompt.txt --stop="<|endoftext|>" --temperature=0
    $ python sample.py --prompts=prompts.txt --max_words=50 --out=samples.jsonl
    $ python sample.py --start="The answer is" --top_next=10
    $ python sample.py --interactive

Standard output has only the text: each sample after its prompt, then a line of dashes. Notices go
to standard error. Samples of all prompts are drawn in batches; the first of a batch is streamed,
the others are printed when the batch is finished. A sample depends on the seed and its number, not
on the samples drawn with it. The number counts the samples of one prompt, or, with --interactive,
those of the session.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_type_hints

import torch

from brisk.cuda_graph import check_device
from brisk.data.tokenizer import EOT, Tokenizer, knows_documents
from brisk.device import Device, open_device, resolve_compile
from brisk.errors import UserError, one_line_errors, without_controls
from brisk.generation.kv_cache import CACHE_BYTES, row_bytes
from brisk.generation.prompt import drawable, encode_prompt, encode_text
from brisk.generation.repl import converse, open_new, read_prompt, read_prompts, write_sample
from brisk.generation.text_stream import TextStream
from brisk.generation.top_tokens import as_table, top_next_tokens
from brisk.interop.pretrained import read_pretrained
from brisk.training.compilation import compile_model
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
TOKENS_A_WORD = 32  # more than any word has: the budget of a sample that max_words ends
MOST_TOKENS = 10**7  # of one sample
DASHES = "---------------"
# A text follows from these: --out records them, and --interactive has commands for SHAPING.
SHAPING = ("temperature", "top_k", "top_p", "max_new_tokens", "max_words", "stop", "seed")
ORIGIN = ("init_from", "out_dir")


@dataclass(frozen=True)
class SampleConfig:
    # model
    init_from: str = "resume"  # resume, gpt2*, a checkpoint, or a Hugging Face folder
    out_dir: str = "out"  # folder of the run with init_from=resume; ckpt.pt is read, else last.pt
    # prompts
    start: str = ""  # the prompt, or FILE:prompt.txt; empty: a newline or end-of-text
    prompts: str = ""  # instead of start: a file of prompts, one a line; blank lines are skipped
    interactive: bool = False  # type prompts and read the text as it is drawn; see /help there
    # sampling
    num_samples: PositiveInt = 10  # samples of each prompt; default with interactive: 1
    max_new_tokens: Annotated[int, (0, MOST_TOKENS)] = 500  # length of a sample at most
    max_words: NonNegativeInt = 0  # length in whole words at most; 0: no limit
    temperature: NonNegativeFloat = 0.8  # divides the logits; 0: the most likely token
    top_k: NonNegativeInt = 200  # sample from the k most likely tokens; 0: all
    top_p: UnitFloat = 1.0  # sample from the fewest tokens with this total probability; 1: all
    exact_window: bool = False  # past block_size see all of it, not half to all; much slower
    rows: Literal["auto", "windows", "documents"] = "auto"  # documents: end at an end-of-text
    stop: str = ""  # end a sample before this text; <|endoftext|> too
    seed: Seed = 1337  # of the random numbers: the same seed gives the same text
    # output
    top_next: NonNegativeInt = 0  # instead of samples: the n most likely next tokens
    out: str = ""  # also write prompts and samples to this new file, one JSON object a line
    # system
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of autocast
    compile: bool | Literal["auto"] = False  # torch.compile the blocks: a slow start, then faster
    cuda_graph: bool = False  # replay decode steps as CUDA graphs: a slow start, then faster

    given: tuple = field(default=(), compare=False)  # names of the keys that were set, in order


@dataclass(frozen=True)
class Source:
    """A model, and how text goes into it and comes out."""

    model: GPT
    tokenizer: Tokenizer
    device: Device
    documents: bool  # an end-of-text comes before each prompt, and ends the sample


@dataclass(frozen=True)
class Prompt:
    """A text to be continued."""

    text: str  # as it was given
    ids: torch.Tensor  # (T,), T at least 1
    shown: str  # as it is printed


@dataclass
class Sample:
    """One text to be drawn."""

    prompt: Prompt
    number: int  # of the random numbers that it is drawn with
    drawn: str = ""  # what was drawn of it so far
    printed: bool = False  # at least in part


def main(config):
    sys.stdout.reconfigure(encoding="utf-8")  # the default everywhere but on Windows
    texts, out = before_loading(config)
    if config.interactive and "num_samples" not in config.given:
        config = replace(config, num_samples=1)
    with redirect_stdout(sys.stderr):
        source = load_source(config)
    check_stop(config.stop, source.tokenizer)
    prompts = make_prompts(source, texts, config)  # all of them before the first is answered
    with source.device.autocast():
        for prompt in prompts:
            note_lost_words(source, prompt)
            if config.top_next:
                print_top_next(source, prompt, config)
        if not config.top_next:
            draw(
                source,
                [one for prompt in prompts for one in samples_of(prompt, config)],
                config,
                out,
            )
        if config.interactive:
            interact(source, config, out)


def before_loading(config):
    """The texts of the prompts, and the file for samples or None. A mistake in these is reported
    before the model is loaded."""
    if (config.start != "") + (config.prompts != "") + config.interactive > 1:
        raise UserError("start, prompts and interactive exclude each other: give one of them")
    if config.out and config.top_next and not config.interactive:
        raise UserError("top_next draws no samples for out: leave one of them out")
    texts = read_prompts(config.prompts) if config.prompts else [read_prompt(config.start)]
    out = open_new(config.out) if config.out else None
    return [] if config.interactive else texts, out


def load_source(config):
    """The `Source` that the settings name, on its device."""
    device = open_device(config.device, config.dtype)
    if config.cuda_graph:
        check_device(device)
    start = read_pretrained(config.init_from, config.out_dir)
    model, tokenizer = GPT.from_checkpoint(start.checkpoint), start.tokenizer
    model.to(device.device)
    print(f"{model.get_num_params() / 1e6:.2f}M parameters on {device}")
    device.cast_linear_weights(model)
    if resolve_compile(config.compile, device):
        compile_model(model, 0, print, blocks_only=True)
    rows = start.settings.get("rows") if config.rows == "auto" else config.rows
    documents = knows_documents(rows, tokenizer) and config.rows != "windows"
    if config.rows == "documents" and not documents:
        raise UserError("rows=documents: this tokenizer has no end of text")
    return Source(model, tokenizer, device, documents)


def check_stop(stop, tokenizer):
    if stop == EOT and tokenizer.eot is None:
        raise UserError(f"stop={EOT}: this tokenizer has no end of text; leave stop out")


def make_prompts(source, texts, config):
    """A `Prompt` for each of `texts`; an error names the file and the number of the prompt."""
    prompts = []
    for number, text in enumerate(texts, 1):
        try:
            prompts.append(make_prompt(source, text))
        except UserError as error:
            where = f"{config.prompts}, prompt {number}: " if config.prompts else ""
            raise UserError(f"{where}{error}") from error
    return prompts


def make_prompt(source, text):
    """The `Prompt` of a text. A token that is only there for the model to begin is not shown."""
    ids = encode_prompt(text, source.tokenizer, source.documents)
    shown = source.tokenizer.decode(encode_text(text, source.tokenizer, source.documents))
    return Prompt(text, torch.tensor(ids, device=source.device.device), shown)


def note_lost_words(source, prompt):
    if unknown := prompt.ids.tolist().count(source.tokenizer.unk):
        print(f"note: the model does not know {unknown} of the words", file=sys.stderr)
    elif prompt.text.strip() and not prompt.shown:
        lost = "stop words and punctuation, which the model leaves out"
        print(f"note: the prompt is empty: it has only {lost}", file=sys.stderr)


def samples_of(prompt, config, first=0):
    """The samples to draw after a prompt, numbered from `first`."""
    return [Sample(prompt, first + i) for i in range(config.num_samples)]


def print_top_next(source, prompt, config):
    allowed = drawable(source.tokenizer)
    top = top_next_tokens(source.model, prompt.ids[None], config.top_next, **allowed)
    print(as_table(*top, source.tokenizer), DASHES, sep="\n", flush=True)


def draw(source, samples, config, out):
    """Draw and print `samples`, in batches; write them to the file `out` too, unless it is None."""
    settings = {key: getattr(config, key) for key in (*SHAPING, *ORIGIN)}
    for batch in batches(samples, token_budget(config), source.model.config):
        print_samples(source, batch, config)
        for sample in batch if out else ():
            write_sample(out, sample.prompt.text, sample.number, sample.drawn, settings)


def batches(samples, budget, sizes):
    """Lists of consecutive `samples` to draw as one batch, `budget` tokens each, by a model with
    the config `sizes`: as many as have room if all are as long as the longest."""
    room = min(TOKENS_AT_ONCE, CACHE_BYTES * sizes.block_size // row_bytes(sizes))
    batch, longest = [], 0
    for sample in samples:
        window = min(len(sample.prompt.ids) + budget, sizes.block_size)
        if batch and (len(batch) + 1) * max(longest, window) > room:
            yield batch
            batch, longest = [], 0
        batch.append(sample)
        longest = max(longest, window)
    if batch:
        yield batch


def token_budget(config):
    """The most tokens to draw in a sample. With max_words alone, the words end it long before."""
    if config.max_words and "max_new_tokens" not in config.given:
        return min(TOKENS_A_WORD * config.max_words, MOST_TOKENS)
    return config.max_new_tokens


def print_samples(source, samples, config):
    """Draw `samples` side by side and print each after its prompt, the first as it is drawn."""
    ends_by_id = source.documents or config.stop == EOT
    stop_ids = [source.tokenizer.eot] if ends_by_id else []
    stop_text = "" if config.stop == EOT else config.stop
    streams = [TextStream(source.tokenizer, stop_text, stop_ids, config.max_words) for _ in samples]

    def on_token(step, ids):
        pieces = [stream.feed(i) for stream, i in zip(streams, ids.tolist(), strict=True)]
        for sample, piece in zip(samples, pieces, strict=True):
            sample.drawn += piece
        show(pieces[0], end="")
        return [stream.stopped for stream in streams]

    show(samples[0].prompt.shown, end="")
    samples[0].printed = True
    try:
        source.model.generate(
            [sample.prompt.ids for sample in samples],
            token_budget(config),
            config.temperature,
            config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            samples=[sample.number for sample in samples],
            on_token=on_token,
            exact_window=config.exact_window,
            cuda_graph=config.cuda_graph,
            **drawable(source.tokenizer),
        )
    except KeyboardInterrupt:
        print(flush=True)  # what comes next begins a line
        raise
    rests = [stream.finish() for stream in streams]
    for sample, rest in zip(samples, rests, strict=True):
        sample.drawn += rest
    show(f"{rests[0]}\n{DASHES}")
    for sample in samples[1:]:
        show(f"{sample.prompt.shown}{sample.drawn}\n{DASHES}")
        sample.printed = True


def last_text(samples):
    """The text of the last of `samples` that was printed, to be continued. Half a character at its
    end is left out."""
    printed = [sample for sample in samples if sample.printed]
    if not printed:
        raise UserError("there is no text to continue yet; type a prompt")
    return f"{printed[-1].prompt.shown}{printed[-1].drawn}".removesuffix(
        "\N{REPLACEMENT CHARACTER}"
    )


def interact(source, config, out):
    """Answer prompts and commands from standard input until it ends."""
    about = help_lines(SampleConfig)

    samples = []  # of the newest prompt that has any

    def answer(config, line, first):
        nonlocal samples
        text = last_text(samples) if line is None else read_prompt(line)
        prompt = make_prompt(source, text)
        note_lost_words(source, prompt)
        if config.top_next:
            print_top_next(source, prompt, config)
        else:
            samples = samples_of(prompt, config, first)
            draw(source, samples, config, out)

    def change(config, key, text):
        kind = get_type_hints(SampleConfig, include_extras=True)[key]
        value = checked(parsed(text, kind), kind, key, "here")
        if key == "stop":
            check_stop(value, source.tokenizer)
        return with_values(config, {key: value})

    keys = {key: about[key] for key in (*SHAPING, "num_samples", "top_next")}
    converse(config, keys, change, answer)


def show(text, end="\n"):
    """Print `text` as it is to a file or a pipe, without control characters to a terminal."""
    print(without_controls(text) if sys.stdout.isatty() else text, end=end, flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(SampleConfig, sys.argv[1:]))
