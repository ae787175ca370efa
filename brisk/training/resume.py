"""Starting a run: from scratch, or from a checkpoint with its settings and tokenizer."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from brisk.checkpoint import checkpoint_of, has_checkpoint, latest_checkpoint
from brisk.data.bpe import gpt2
from brisk.data.saved_tokenizer import from_dict, same_tokenizer
from brisk.device import DTYPES
from brisk.distributed.broadcast import broadcast_checkpoint
from brisk.errors import UserError, did_you_mean
from brisk.interop.huggingface import GPT2_NAMES
from brisk.interop.pretrained import read_model
from brisk.renamed_keys import new_key

# ----------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Start:
    """The start of a run: from scratch, from given weights, or a resume."""

    checkpoint: dict | None = None  # `model_args`, `model` and more; None from scratch
    saved: "SavedRun | None" = None  # the run to resume, if any

    @property
    def model_args(self):
        return self.checkpoint["model_args"] if self.checkpoint else None

    @property
    def step(self):
        return self.checkpoint["iter_num"] if self.saved else 0


def load_start(given, ranks):
    """Load the `Start` that `init_from` names. Rank 0 reads and broadcasts it: other hosts may have
    older files or none."""

    def set_parallel(start):  # before the tensors: with FSDP they are not broadcast
        if start["resuming"] and "parallel" not in given.given:
            ranks.parallel = saved_parallel(start["checkpoint"], given.parallel)

    start = broadcast_checkpoint(ranks, read_start, given, before_tensors=set_parallel)
    checkpoint = start["checkpoint"]
    if {"minutes", "max_iters", "max_epochs"} & {*given.given}:  # longer: patience starts anew
        (checkpoint or {}).pop("evals_since_best", None)
    saved = SavedRun.of(checkpoint, given.given) if start["resuming"] else None
    return Start(checkpoint, saved)


def saved_parallel(checkpoint, default):
    parallel = checkpoint.get("config", {}).get("parallel")
    return parallel if parallel in ("ddp", "fsdp") else default


def read_start(given):
    known = ["scratch", "resume", "auto", *GPT2_NAMES]
    source = given.init_from
    if source not in known and not Path(source).exists():
        hint = (
            did_you_mean(source, known)
            or f"; it takes {', '.join(known)}, a folder or a checkpoint"
        )
        raise UserError(f"--init_from={source} does not exist{hint}")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if source == "auto" or restarted:
        source = "resume" if has_checkpoint(given.out_dir) else source
    if source in ("scratch", "auto"):
        return {"checkpoint": None, "resuming": False}
    resuming = source == "resume"
    path = latest_checkpoint(given.out_dir) if resuming else checkpoint_of(source)
    checkpoint = read_model(path)
    if resuming:
        if missing := {"optimizer", "iter_num", "best_val_loss"} - checkpoint.keys():
            reason = f"cannot resume from {path} without {' and '.join(sorted(missing))}"
            raise UserError(f"{reason}; start a new run from its weights: --init_from={path}")
    return {"checkpoint": checkpoint, "resuming": resuming}


# ----------------------------------------------------------------------------- the saved run


@dataclass(frozen=True)
class SavedRun:
    """The run that saved a checkpoint."""

    config: dict  # settings as given
    given: tuple  # keys that were given, in order
    resolved: dict  # derived values, see `brisk.training.plan`
    position: int  # windows or documents of the training data consumed
    block_size: int  # tokens in a window
    data: dict | None  # `identity` of the training data; None if unknown

    @classmethod
    def of(cls, checkpoint, now=()):
        """From a checkpoint of this version, of version 0.1 or of nanoGPT. The keys `now` were
        given at this start: dtype and compile among them are dropped from `resolved`. Raises
        `UserError` for an invalid entry."""
        config = {new_key(key): value for key, value in checkpoint.get("config", {}).items()}
        resolved = checkpoint.get("resolved", {})
        if "resolved" not in checkpoint:
            precision = checkpoint.get("precision")
            if precision is None:  # nanoGPT: these settings are of the machine, not of the run
                for key in ("device", "dtype", "compile", "backend"):
                    config.pop(key, None)
            elif len(precision) == 2:
                resolved = dict(zip(("device", "dtype"), precision, strict=True))
            if config.get("max_epochs"):  # 0.1 overwrote both with values derived from it
                if config.get("lr_decay_iters") == config.pop("max_iters", None):
                    config.pop("lr_decay_iters", None)
        given = tuple(map(new_key, checkpoint.get("given", config)))
        if resolved and resolved.get("dtype") not in DTYPES:
            raise UserError(f"the checkpoint has an invalid dtype: {resolved.get('dtype')!r}")
        overridden = {"dtype", "compile"} & {*now}
        resolved = {key: value for key, value in resolved.items() if key not in overridden}
        position = checkpoint.get("position")
        if position is None:
            position = checkpoint["iter_num"] * saved_batch(config)
        block_size = checkpoint["model_args"]["block_size"]
        return cls(config, given, resolved, position, block_size, checkpoint.get("data"))


def saved_batch(config):
    """Sequences in a step of a nanoGPT run with the settings `config`."""
    sizes = [config.get(key, 1) for key in ("gradient_accumulation_steps", "batch_size")]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise UserError(f"the checkpoint has an invalid batch: {sizes[0]!r} times {sizes[1]!r}")
    return sizes[0] * sizes[1]


def identity(meta, tokens):
    """Identifies the training data: the number of tokens and, from `meta.json`, their checksum."""
    sha256 = meta["splits"]["train"].get("sha256") if meta else None
    return {"tokens": tokens, "sha256": sha256 if isinstance(sha256, str) else None}


def is_other_data(saved, config, data):
    """Whether `data`, an `identity`, differs from the data of the `saved` run. Checkpoints of
    version 0.1 and of nanoGPT do not have it; for them the name of the data set is compared."""
    if saved.data is None:
        return saved.config.get("dataset", config.dataset) != config.dataset
    known = saved.data.get("sha256") and data["sha256"]
    return any(saved.data.get(key) != data[key] for key in data if known or key == "tokens")


def resumed_position(saved, config, data, log):
    """The position in the training data at which a resumed run starts, in windows or documents.

    Other data starts at 0. With another block_size, the position is converted and rounded down, so
    the epoch may repeat a window.
    """
    if is_other_data(saved, config, data):
        log.say("note: the training data has changed; starting at its beginning")
        return 0
    if saved.config.get("rows", "windows") != config.rows:
        log.say(f"note: rows={config.rows} has changed; starting at the first one")
        return 0
    if config.rows == "windows":
        return saved.position * saved.block_size // config.block_size
    return saved.position


# ----------------------------------------------------------------------------- its settings


def resolve(given, start, shape_keys, log):
    """The final settings of the run: those `given` override those of a resumed run. The keys
    `shape_keys` are taken from an existing model.

    Raises `UserError` if the given `block_size` exceeds that of a pretrained model.
    """
    if start.model_args is None:
        return given
    values = {}
    if start.saved:
        log.say(f"Resuming training from {given.out_dir} at step {start.step}")
        values = saved_settings(given, start.saved, shape_keys, log)
    stays = []
    for key in shape_keys:
        default = getattr(type(given), key)  # a checkpoint omits default values
        kept, wanted = start.model_args.get(key, default), getattr(given, key)
        if key == "block_size" and wanted < kept and (key in given.given or not start.saved):
            continue  # crop the model
        if key == "block_size" and wanted > kept and key in given.given and not start.saved:
            raise UserError(f"--block_size={wanted}: {given.init_from} has only {kept}")
        stays += [f"{key}={kept}"] if key in given.given and wanted != kept else []
        values[key] = kept
    rows = start.model_args["vocab_size"]
    if "vocab_size" in given.given and given.vocab_size not in (0, rows):
        stays.append(f"vocab_size={rows}")
    if stays:
        whose = "the checkpoint's" if start.saved else f"{given.init_from}'s"
        log.say(f"note: {whose} {', '.join(stays)} stays; the given value is ignored")
    before = start.saved.given if start.saved else ()
    before = (key for key in before if key not in (*given.start_keys, *given.given))
    return replace(given, **values, given=(*before, *given.given))


def saved_settings(given, saved, shape_keys, log):
    """The `saved` settings that a resume takes over: all except keys given now, `given.start_keys`
    and the shape of the model."""
    now, elsewhere = set(given.given), {*given.start_keys, *shape_keys}
    known = sorted(now & saved.config.keys() - elsewhere)
    changed = [key for key in known if saved.config[key] != getattr(given, key)]
    if changed:
        pairs = [f"{key} {saved.config[key]} → {getattr(given, key)}" for key in changed]
        log.say(f"note: changed from the checkpoint's: {', '.join(pairs)}")
    left = now | elsewhere | ({"data_dir"} if "dataset" in now else set())
    return {
        key: value
        for key, value in saved.config.items()
        if key not in left and hasattr(given, key) and has_type_of(value, getattr(given, key))
    }


def has_type_of(value, default):
    """Whether a saved `value` has a type that fits a key with this `default`: "auto" may be a bool,
    and a float may be an int (nanoGPT saves `weight_decay = 0`)."""
    if type(default) is float:
        return type(value) in (int, float)
    return type(value) is type(default) or (default == "auto" and type(value) is bool)


def describe_tokenizer(tokenizer, checkpoint, data_dir, log):
    """The tokenizer as a dict for the checkpoint, so that sampling needs no other file.

    Raises `UserError` if `checkpoint` was trained with another tokenizer.
    """
    try:
        tokenizer = tokenizer or gpt2()
    except UserError as error:
        log.say(f"note: the checkpoint will not contain a tokenizer: {error}")
        return None
    before = (checkpoint or {}).get("tokenizer")
    if before is not None and not same_tokenizer(from_dict(before), tokenizer):
        raise UserError(
            f"{data_dir} has another tokenizer than the checkpoint; "
            "prepare the data again, or use another --dataset"
        )
    return tokenizer.to_dict()
