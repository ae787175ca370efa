"""What a run derives from its settings, its data and where it starts, anew at every start."""

from dataclasses import dataclass

from brisk.device import cpu_training_dtype, resolve_compile
from brisk.errors import UserError
from brisk.starting import is_other_data, resumed_position


@dataclass(frozen=True)
class Plan:
    """Derived values of one start of a run. The settings stay as they were given."""

    first_step: int
    position: int  # windows or documents of the training data consumed before it
    last_step: int
    decay_steps: int  # step at which the learning rate reaches min_lr
    length: str  # the setting that decides last_step, as key=value
    resolved: dict  # what a checkpoint keeps of all this

    @property
    def dtype(self):
        return self.resolved["dtype"]

    @property
    def compile(self):
        return self.resolved["compile"]


def make_plan(config, saved, step, train_data, device, ranks, log):
    """The `Plan` of a start at `step`.

    Args:
        config: the settings; `config.given` are the keys that were given, in order.
        saved: the `SavedRun` that is resumed, or None.
        train_data: (its rows in an epoch, its `identity`).
        device: a `Device`; its precision is taken where `dtype=auto` on anything but a CPU.
    """
    rows, data = train_data
    position = resumed_position(saved, config, data, log) if saved else 0
    resolved = saved.resolved if saved else {}
    dtype, compiling = resolve_precision(config, resolved, device, ranks, log)
    epochs, batch = epochs_to_train(config), global_batch(config)
    if {"max_iters", "max_epochs"} <= {*config.given} and config.max_epochs:
        decides, other = ("max_epochs", "max_iters") if epochs else ("max_iters", "max_epochs")
        log.say(f"note: {decides}={getattr(config, decides):g}, given after {other}, decides")
    last_step, length = config.max_iters, f"max_iters={config.max_iters}"
    basis = [epochs, rows, batch, config.block_size, config.rows]
    if epochs:
        length = f"max_epochs={epochs:g}"
        if resolved.get("basis") == basis and not is_other_data(saved, config, data):
            last_step = resolved["last_step"]  # after a rewind it cannot be derived again
        else:
            last_step = last_step_of_epochs(epochs, rows, batch, step, position)
    # With max_epochs the schedule is as long as the run, unless it is given.
    follows = config.max_epochs and "lr_decay_iters" not in config.given
    decay_steps = last_step if follows else config.lr_decay_iters
    resolved = {"device": device.type, "dtype": dtype, "compile": compiling}
    resolved |= {"last_step": last_step, "decay_steps": decay_steps, "basis": basis}
    return Plan(step, position, last_step, decay_steps, length, resolved)


def global_batch(config):
    """Sequences in a step, over all micro-batches and processes."""
    return config.gradient_accumulation_steps * config.batch_size


def epochs_to_train(config):
    """`max_epochs` where it decides the length of the run, else 0: of `max_epochs` and `max_iters`
    the one that was given later does."""
    later = [key for key in config.given if key in ("max_epochs", "max_iters")][-1:]
    return 0.0 if later == ["max_iters"] else config.max_epochs


def last_step_of_epochs(epochs, rows, batch, step, position):
    """The last step of a run of `epochs` passes over `rows` rows in batches of `batch`, which is at
    `step` and has consumed `position` rows. A run from scratch has one step at least."""
    steps = step + (epochs * rows - position) / batch
    if steps >= 2**63:
        raise UserError(f"--max_epochs={epochs:g}: too many steps to count")
    return max(step or 1, round(steps)) - 1


def resolve_precision(config, resolved, device, ranks, log):
    """(dtype, whether to compile): as the run has them, where it ran on this kind of device and
    neither is given now; else as the settings say."""
    wanted = {"dtype": config.dtype, "compile": config.compile}
    if resolved.get("device") == device.type:
        wanted |= {key: resolved[key] for key in wanted if key in resolved}
    elif "device" in resolved:
        log.say(
            f"note: the checkpoint was trained on {resolved['device']}; "
            f"dtype and compile are derived anew for {device.type}"
        )
    dtype = wanted["dtype"]
    if dtype == "auto" and device.type == "cpu":
        dtype = cpu_training_dtype(config.batch_size, config.block_size, config.n_embd)
    elif dtype == "auto":
        dtype = device.dtype_name
    return ranks.agree(dtype), resolve_compile(wanted["compile"], device)
