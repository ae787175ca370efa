"""A trained model, by whatever `init_from` names: the run in `out_dir`, a checkpoint file, GPT-2,
or a Hugging Face directory."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from brisk.checkpoint import best_checkpoint, load_checkpoint
from brisk.data.bpe import gpt2
from brisk.data.dataset import load_tokenizer
from brisk.data.saved_tokenizer import from_dict
from brisk.errors import UserError, did_you_mean
from brisk.interop.huggingface import GPT2_NAMES, load_pretrained
from brisk.interop.tokenizer_json import read_tokenizer


@dataclass(frozen=True)
class Pretrained:
    """The parts of a trained model."""

    name: str  # of the run's folder, of the directory, or of GPT-2
    checkpoint: dict  # with `model_args`, of GPTConfig, and `model`, the state dict on the CPU
    tokenizer: object
    settings: dict  # of the run that trained it; empty for GPT-2 and directories


def read_pretrained(init_from, out_dir):
    """The `Pretrained` that `init_from` names; the run in `out_dir` where that is "resume".

    Prints what was read. Raises `UserError` for a name that is none of these, a damaged file, or
    a tokenizer that does not belong to the model.
    """
    if init_from == "resume":
        init_from = best_checkpoint(out_dir)
    if Path(init_from).is_file():
        checkpoint = read_model(init_from)
        print(f"checkpoint {init_from}, iteration {checkpoint.get('iter_num', 'unknown')}")
        tokenizer = tokenizer_of(checkpoint)
    elif init_from in GPT2_NAMES or Path(init_from).is_dir():
        own = read_tokenizer(init_from)
        print(f"weights of {init_from}, {'its' if own else 'GPT-2'} tokenizer")
        checkpoint, tokenizer = read_model(init_from), own or gpt2()
    else:
        names = ["resume", *GPT2_NAMES]
        raise UserError(
            f"init_from={init_from} is no checkpoint file, no directory and none of "
            f"{', '.join(names)}{did_you_mean(init_from, names)}"
        )
    rows = checkpoint["model_args"]["vocab_size"]
    if tokenizer.vocab_size > rows:
        sizes = f"{tokenizer.vocab_size} tokens, the model {rows}"
        remedy = "put the data set's meta.json or meta.pkl in its folder"
        raise UserError(f"the tokenizer has {sizes}: they do not belong together; {remedy}")
    path = Path(init_from).resolve()
    name = path.parent.name if path.is_file() else path.name
    return Pretrained(name, checkpoint, tokenizer, checkpoint.get("config", {}))


def read_model(source):
    """A dict with the `model_args` and the state dict `model` of the model that `source` names: a
    checkpoint file, with all its entries, GPT-2, or a Hugging Face directory."""
    if Path(source).is_file():
        return load_checkpoint(source)
    model_args, weights = load_pretrained(source)
    parts = {"model_args": model_args, "model": weights}
    if Path(source).is_dir():
        with suppress(UserError):  # one that cannot be read here cannot be compared either
            if own := read_tokenizer(source):
                parts["tokenizer"] = own.to_dict()
    return parts


def tokenizer_of(checkpoint):
    """The tokenizer inside a checkpoint, else that of its data set, else GPT-2's."""
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
