"""Where a run starts: from scratch, or from a checkpoint with its settings and tokenizer."""

import os
from pathlib import Path

from brisk.checkpoint import latest_checkpoint, load_checkpoint
from brisk.errors import UserError, nearest
from brisk.handing import handed_out
from brisk.huggingface import GPT2_NAMES
from brisk.tokenizer import from_dict, gpt2

# What a resumed run does not take over from its checkpoint: it is of this start, or this machine.
OF_THIS_START = {
    "out_dir",
    "init_from",
    "eval_only",
    "dry_run",
    "verify_data",
    "backend",
    "timeout",
    "device",
    "dtype",
    "compile",
    "parallel",
    "cpu_offload",
    "dry_run_ranks",
}
# Keys that are also fields of a GPTConfig: a checkpoint's stay, only block_size may get smaller.
MODEL_SHAPE = (
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "block_size",
    "n_kv_head",
    "position",
    "rope_theta",
    "norm",
    "qk_norm",
    "mlp",
    "mlp_width",
    "tied",
    "zero_init",
    "ngrams",
    "ngram_rows",
)
DROPOUTS = ("dropout", "ngram_dropout")  # what else a model has, and may change


def starting_point(config, ranks):
    """(checkpoint or None, whether to resume it) for `init_from`. The main process reads it, and
    the others get it from there: they may not have its folder, or have an older state of it."""
    start = handed_out(ranks, read_starting_point, config)
    return start["checkpoint"], start["resuming"]


def read_starting_point(config):
    known = ["scratch", "resume", "auto", *GPT2_NAMES]
    start = config.init_from
    if start not in known and not Path(start).exists():
        hint = nearest(start, known) or f"; it takes {', '.join(known)}, a folder or a checkpoint"
        raise UserError(f"--init_from={start}: no such thing{hint}")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if start == "auto" or restarted:
        saved = any(Path(config.out_dir, name).exists() for name in ("last.pt", "ckpt.pt"))
        start = "resume" if saved else start
    if start == "resume":
        path = latest_checkpoint(config.out_dir)
        checkpoint = load_checkpoint(path)
        if missing := {"optimizer", "iter_num", "best_val_loss"} - checkpoint.keys():
            what = f"{path} has no {' and no '.join(sorted(missing))} to resume with"
            raise UserError(f"{what}; start anew from its weights: --init_from={path}")
        return {"checkpoint": checkpoint, "resuming": True}
    checkpoint = load_checkpoint(start) if Path(start).is_file() else None
    return {"checkpoint": checkpoint, "resuming": False}


def take_over_settings(config, checkpoint, log):
    """Give `config` the checkpoint's settings where none are given now."""
    saved = checkpoint.get("config", {})
    known = config.given & saved.keys() - OF_THIS_START - {*MODEL_SHAPE}
    other = [key for key in sorted(known) if saved[key] != getattr(config, key)]
    changed = [f"{key} {saved[key]} → {getattr(config, key)}" for key in other]
    if changed:
        log.say(f"note: changed from the checkpoint's: {', '.join(changed)}")
    left = OF_THIS_START | config.given
    left |= {"data_dir"} if "dataset" in config.given else set()
    left |= {"max_epochs"} if "max_iters" in config.given else set()
    for key, value in saved.items():
        if hasattr(config, key) and key not in left:
            kind = type(getattr(config, key))
            if type(value) is kind or (kind is float and type(value) is int):
                setattr(config, key, kind(value))
    stays = []
    for key in MODEL_SHAPE:
        default = getattr(type(config), key)  # what a checkpoint leaves out
        kept, given = checkpoint["model_args"].get(key, default), getattr(config, key)
        smaller = key == "block_size" and given < kept and key in config.given
        if given != kept and not smaller:
            stays += [f"{key}={kept}"] if key in config.given else []
            setattr(config, key, kept)
    if stays:
        log.say(f"note: the checkpoint's {', '.join(stays)} stays, whatever is given")


def describe_tokenizer(tokenizer, checkpoint, data_dir, log):
    """The tokenizer as a dict for the checkpoint, so that one file is enough to sample from."""
    try:
        described = (tokenizer or gpt2()).to_dict()
    except UserError as error:
        log.say(f"note: the checkpoint will hold no tokenizer: {error}")
        return None
    before = (checkpoint or {}).get("tokenizer")
    if before is not None and from_dict(before).to_dict() != described:
        raise UserError(
            f"{data_dir} is tokenized otherwise than what the checkpoint was trained on; "
            "prepare the data anew, or name another --dataset"
        )
    return described
