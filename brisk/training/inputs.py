"""The token files and the tokenizer of a run."""

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
    """Token files and tokenizer."""

    folder: Path
    train: TokenFile
    evaluated: dict  # {split: TokenFile}, with rows spread evenly over each file
    tokenizer: object  # None if meta.json has none
    tokenizer_dict: dict | None  # the tokenizer as saved in a checkpoint
    vocab_size: int  # of the model
    prompt: list | None  # ids of the prompt for the samples at evaluations
    identity: dict  # see `brisk.training.resume.identity`


def open_data(config, start, run):
    """Open and check the data set. Raises `UserError` if it is missing or damaged; a dry run may do
    without one and assumes GPT-2's vocabulary."""
    try:
        folder = find_data_dir(config.data_dir, config.dataset)
    except UserError:
        if not config.dry_run or config.max_epochs or start.saved:
            raise
        return without_tokens(config, start)
    meta = read_meta(folder)
    tokenizer = load_tokenizer(folder, meta)
    if config.verify_data:
        verify_data(folder, meta)
    if tokenizer is None:
        run.say("the data has no tokenizer: assuming GPT-2's")
    tokenizer_dict = describe_tokenizer(tokenizer, start.checkpoint, folder, run.log)
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
        tokenizer_dict=tokenizer_dict,
        vocab_size=vocab_size,
        prompt=prompt,
        identity=identity(meta, len(train_data.tokens)),
    )


def without_tokens(config, start):
    """The `RunData` of a dry run without a prepared data set."""
    rows = start.model_args["vocab_size"] if start.model_args else config.vocab_size
    return RunData(
        folder=Path(config.data_dir or Path("data", config.dataset)),
        train=SimpleNamespace(rows=0, tokens=()),
        evaluated={},
        tokenizer=None,
        tokenizer_dict=None,
        vocab_size=rows or vocabulary_rows(None),
        prompt=None,
        identity=identity(None, 0),
    )


def vocabulary_rows(tokenizer):
    """The vocabulary size of a new model: the tokenizer's, for a BPE rounded up to a multiple of 64
    for speed (GPT-2's 50257 becomes 50304)."""
    if tokenizer is None:
        return 50304
    return -(-tokenizer.vocab_size // 64) * 64 if tokenizer.kind == "bpe" else tokenizer.vocab_size
