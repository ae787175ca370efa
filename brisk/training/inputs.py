"""What a run reads: token files, and the tokenizer that made them."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from brisk.data.dataset import load_tokenizer, read_meta, verify_data
from brisk.data.loader import TokenFile, find_data_dir
from brisk.errors import UserError
from brisk.generation.preview import sample_prompt
from brisk.training.resume import describe_tokenizer, identity


@dataclass(frozen=True)
class RunData:
    """What a run reads: its token files, and the tokenizer that made them."""

    folder: Path
    train: TokenFile
    evaluated: dict  # {split: TokenFile}, rows spread evenly over each
    tokenizer: object  # None where the data does not describe one
    described: dict | None  # the tokenizer as a checkpoint keeps it
    vocab_size: int  # rows of the model's vocabulary
    prompt: list | None  # ids that the texts drawn at evaluations begin with
    identity: dict  # see `brisk.training.resume.identity`


def open_data(config, start, run):
    """The `RunData` of the run, checked. Raises `UserError` where it is not there, or not whole,
    except that a dry run does without: it then reckons with GPT-2's vocabulary."""
    try:
        folder = find_data_dir(config.data_dir, config.dataset)
    except UserError:
        if not config.dry_run or config.max_epochs or start.saved:
            raise
        return unprepared(config, start)
    meta = read_meta(folder)
    tokenizer = load_tokenizer(folder, meta)
    if config.verify_data:
        verify_data(folder, meta)
    if tokenizer is None:
        run.say("no tokenizer described with the data: taking it for GPT-2's")
    described = describe_tokenizer(tokenizer, start.checkpoint, folder, run.log)
    prompt = sample_prompt(config, tokenizer, run.log)
    rows = config.vocab_size or vocabulary_rows(tokenizer)
    if tokenizer and rows < tokenizer.vocab_size:
        raise UserError(f"--vocab_size={rows}: the tokenizer has {tokenizer.vocab_size} tokens")
    vocab_size = start.model_args["vocab_size"] if start.model_args else rows

    def open_tokens(split, evenly=0):
        sizes = (config.block_size, vocab_size, meta["dtype"] if meta else "uint16")
        eot = tokenizer.eot if tokenizer else 50256
        return TokenFile(folder / f"{split}.bin", *sizes, config.seed, config.rows, eot, evenly)

    train_data, eval_rows = open_tokens("train"), config.eval_iters * config.batch_size
    return RunData(
        folder=folder,
        train=train_data,
        evaluated={split: open_tokens(split, eval_rows) for split in ("train", "val")},
        tokenizer=tokenizer,
        described=described,
        vocab_size=vocab_size,
        prompt=prompt,
        identity=identity(meta, len(train_data.tokens)),
    )


def unprepared(config, start):
    """The `RunData` of a dry run whose data set is not there yet: no tokens."""
    rows = start.model_args["vocab_size"] if start.model_args else config.vocab_size
    return RunData(
        folder=Path(config.data_dir or Path("data", config.dataset)),
        train=SimpleNamespace(rows=0, tokens=()),
        evaluated={},
        tokenizer=None,
        described=None,
        vocab_size=rows or vocabulary_rows(None),
        prompt=None,
        identity=identity(None, 0),
    )


def vocabulary_rows(tokenizer):
    """Rows of a new model's vocabulary: characters, bytes and words as they are; byte pairs
    rounded up to a multiple of 64, which is faster (GPT-2's 50257 become 50304)."""
    if tokenizer is None:
        return 50304
    return -(-tokenizer.vocab_size // 64) * 64 if tokenizer.kind == "bpe" else tokenizer.vocab_size
