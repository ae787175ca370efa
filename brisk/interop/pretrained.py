"""Load a trained model from a run, a checkpoint file, GPT-2, or a Hugging Face directory."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from brisk.checkpoint import best_checkpoint, checkpoint_of, load_checkpoint
from brisk.data.bpe import gpt2
from brisk.data.dataset import load_tokenizer
from brisk.data.saved_tokenizer import from_dict
from brisk.errors import UserError, did_you_mean
from brisk.interop.huggingface import GPT2_NAMES, load_pretrained
from brisk.interop.tokenizer_json import read_tokenizer

GPT2_ROWS = range(50257, 50305)  # vocabulary sizes of models with GPT-2's tokenizer, padded or not


@dataclass(frozen=True)
class Pretrained:
    """A trained model and its tokenizer."""

    name: str  # of the run's folder, of the directory, or of GPT-2
    checkpoint: dict  # `model_args` for GPTConfig, and `model`, the state dict on the CPU
    tokenizer: object
    settings: dict  # of the training run; empty for GPT-2 and directories


def read_pretrained(init_from, out_dir):
    """Load a `Pretrained` from `init_from`: "resume" for the run in `out_dir`, the folder of
    another run, a checkpoint file, a name of GPT-2, or a Hugging Face directory.

    Prints the source. Raises `UserError` for any other name, a damaged file, or a tokenizer that
    does not match the model.
    """
    init_from = best_checkpoint(out_dir) if init_from == "resume" else checkpoint_of(init_from)
    if Path(init_from).is_file():
        checkpoint = read_model(init_from)
        print(f"checkpoint {init_from}, iteration {checkpoint.get('iter_num', 'unknown')}")
        tokenizer = tokenizer_of(checkpoint)
    elif init_from in GPT2_NAMES or Path(init_from).is_dir():
        own = read_tokenizer(init_from)
        print(f"weights of {init_from}, {'its' if own else 'GPT-2'} tokenizer")
        checkpoint = read_model(init_from)
        if not own and checkpoint["model_args"]["vocab_size"] not in GPT2_ROWS:
            raise UserError(f"{init_from} has no tokenizer.json; copy its model's into it")
        tokenizer = own or gpt2()
    else:
        names = ["resume", *GPT2_NAMES]
        raise UserError(
            f"init_from={init_from} is not a checkpoint file, a directory, or one of "
            f"{', '.join(names)}{did_you_mean(init_from, names)}"
        )
    rows = checkpoint["model_args"]["vocab_size"]
    if tokenizer.vocab_size > rows:
        sizes = f"{tokenizer.vocab_size} tokens, but the model has {rows}"
        remedy = "copy the data set's meta.json or meta.pkl to its folder"
        raise UserError(f"the tokenizer has {sizes}; {remedy}")
    path = Path(init_from).resolve()
    name = path.parent.name if path.is_file() else path.name
    return Pretrained(name, checkpoint, tokenizer, checkpoint.get("config", {}))


def read_model(source):
    """Load the checkpoint file, GPT-2 or Hugging Face directory `source` as a checkpoint dict with
    at least `model_args` and the state dict `model`."""
    if Path(source).is_file():
        return load_checkpoint(source)
    model_args, weights = load_pretrained(source)
    parts = {"model_args": model_args, "model": weights}
    if Path(source).is_dir():
        with suppress(UserError):  # the tokenizer may be of an unsupported kind
            if own := read_tokenizer(source):
                parts["tokenizer"] = own.to_dict()
    return parts


def tokenizer_of(checkpoint):
    """The tokenizer in a checkpoint, else that of its data set, else GPT-2's."""
    if checkpoint.get("tokenizer"):
        return from_dict(checkpoint["tokenizer"])
    settings = checkpoint.get("config", {})
    folders = [settings.get("data_dir"), Path("data", settings.get("dataset", ""))]
    for folder in filter(None, folders):
        if tokenizer := load_tokenizer(folder):
            print(f"tokenizer of {folder}")
            return tokenizer
    print("No meta.pkl found, assuming GPT-2 encodings...")
    return gpt2()
