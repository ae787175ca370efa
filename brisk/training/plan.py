"""The plan of a run: values derived from settings, data and checkpoint at every start."""

from dataclasses import dataclass, replace

from brisk.device import Device, cpu_training_dtype, resolve_compile
from brisk.distributed.parallelize import check_offload
from brisk.errors import UserError, format_bytes
from brisk.reporting.forecast import duration
from brisk.training.cuda_graph import check_cuda_graph
from brisk.training.memory import expected_memory, shared_state
from brisk.training.resume import is_other_data


@dataclass(frozen=True)
class Plan:
    """Derived values. The settings themselves stay as given."""

    first_step: int
    last_step: int
    decay_steps: int  # step at which the learning rate reaches min_lr
    length: str  # the setting that determines last_step, as key=value
    device: Device  # with its precision
    global_batch: int  # sequences in a step, over all micro-batches and processes
    patience: int  # evaluations without a lower validation loss that end the run; 0: off
    micro_batches: tuple  # this rank's (index, first, count), see `Ranks.micro_batches`
    resolved: dict  # derived values that a checkpoint keeps
    lines: tuple  # description of the plan, for the console

    @property
    def compile(self):
        return self.resolved["compile"]

    def reason_to_end(self, state):
        """Why the run ends at `state`, in words, or "" if it continues."""
        if state.step > self.last_step:
            return f"step {state.step} is past {self.length}; give it more, or --minutes=10"
        if self.patience and state.evals_since_best >= self.patience:
            best = f"best {state.best_val_loss:.4f}"
            return f"{state.evals_since_best} evaluations without a lower val loss ({best})"
        return ""


def make_plan(config, start, state, data, run):
    """Derive the `Plan` from the settings, the `Start`, the `TrainState` and the data."""
    if config.cpu_offload and not config.dry_run:
        check_offload(run.ranks, run.device)
    resolved = start.saved.resolved if start.saved else {}
    dtype, compiling = resolve_precision(config, resolved, run)
    device = replace(run.device, dtype_name=dtype)
    if config.cuda_graph and not config.dry_run:
        check_cuda_graph(config, device, run.ranks)
    epochs, batch, rows = epochs_to_train(config), global_batch(config), data.train.rows
    last_step, length = config.max_iters, f"max_iters={config.max_iters}"
    basis = [epochs, rows, batch, config.block_size, config.rows]
    if epochs:
        length = f"max_epochs={epochs:g}"
        if resolved.get("basis") == basis and not is_other_data(start.saved, config, data.identity):
            last_step = resolved["last_step"]  # after a rewind, step and position do not match
        else:
            last_step = last_step_of_epochs(epochs, rows, batch, state.step, state.position)
    # With max_epochs, the schedule by default ends with the run.
    follows = config.max_epochs and "lr_decay_iters" not in config.given
    decay_steps = last_step if follows else config.lr_decay_iters
    lines = [*describe(config, last_step, data, device, compiling, state.model, run.ranks)]
    if start.saved and config.decay_lr and config.min_lr == 0 and decay_steps < last_step:
        longer = f"--lr_decay_iters={last_step} extends the schedule"
        lines.append(f"note: the learning rate is 0 after step {decay_steps}; {longer}")
    resolved = {"device": device.type, "dtype": dtype, "compile": compiling}
    resolved |= {"last_step": last_step, "decay_steps": decay_steps, "basis": basis}
    return Plan(
        first_step=state.step,
        last_step=last_step,
        decay_steps=decay_steps,
        length=length,
        device=device,
        global_batch=batch,
        patience=config.patience,
        micro_batches=tuple(
            run.ranks.micro_batches(config.gradient_accumulation_steps, config.batch_size)
        ),
        resolved=resolved,
        lines=tuple(lines),
    )


def describe(config, last_step, data, device, compiling, model, ranks):
    """Yield lines that describe the run: data, parameters, steps, device and expected memory."""
    if data.train.rows:
        yield f"data: {data.folder}, {len(data.train.tokens):,} training tokens"
    else:
        yield f"data: {data.folder} is not prepared; assuming a vocabulary of {data.vocab_size:,}"
    batch = global_batch(config)
    yield f"number of parameters: {model.get_num_params() / 1e6:.2f}M"
    if config.ngrams > 1:
        yield f"number of n-gram parameters: {model.transformer.ngrams.weight.numel() / 1e6:.2f}M"
    tokens, steps = batch * config.block_size, last_step + 1
    if {"max_iters", "max_epochs"} <= {*config.given} and config.max_epochs:
        pair = ("max_iters", "max_epochs")
        later, earlier = pair[::-1] if epochs_to_train(config) else pair
        yield f"note: {later}={getattr(config, later):g} was given after {earlier} and overrides it"
    yield f"tokens per iteration will be: {tokens:,}"
    epochs = f", {batch * steps / data.train.rows:.3g} epochs" if data.train.rows else ""
    yield f"plan: {steps:,} steps, {steps * tokens:,} tokens{epochs}"
    ranks = replace(ranks, world_size=config.dry_run_world_size or ranks.world_size)
    micro_batches = ranks.micro_batches(config.gradient_accumulation_steps, config.batch_size)
    memory = expected_memory(
        model,
        max(count for _, _, count in micro_batches),
        device,
        recomputed=config.activation_checkpointing,
        ranks=ranks,
        accumulates=len(micro_batches) > 1 or config.cuda_graph,
        offload=config.cpu_offload,
    )
    compiled = "compiled" if compiling else "not compiled"
    compiled += ", as CUDA graphs" if config.cuda_graph else ""
    count = f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}"
    processes = f"{count} ({config.parallel}), each on "
    where = f"{'' if ranks.is_alone else processes}{device}, {compiled}"
    needed = f"about {format_bytes(memory)} of memory for training, plus PyTorch's own"
    yield f"device: {where}; {needed}"
    if config.cpu_offload:
        yield f"and {format_bytes(shared_state(model, ranks))} of host memory for each process"
    if device.type == "cpu" and device.dtype_name == "float16":
        yield "note: on a CPU, float16 is far slower than float32 and bfloat16"
    if config.dry_run:
        flops = model.flops_per_token() * tokens * steps
        peak, source = device.peak_flops()
        peak *= ranks.world_size
        speed = f"{peak / 1e12:.3g} TFLOP/s, {source}"
        yield f"compute: {flops:.3g} FLOP; at least {duration(flops / peak)} at {speed}"


def global_batch(config):
    """Sequences in a step, over all micro-batches and processes."""
    return config.gradient_accumulation_steps * config.batch_size


def epochs_to_train(config):
    """`max_epochs`, or 0 if `max_iters` was given later and overrides it."""
    later = [key for key in config.given if key in ("max_epochs", "max_iters")][-1:]
    return 0.0 if later == ["max_iters"] else config.max_epochs


def last_step_of_epochs(epochs, rows, batch, step, position):
    """The last step of a run of `epochs` passes over `rows` rows in batches of `batch`, now at
    `step` with `position` rows consumed. A run from scratch has at least one step."""
    steps = step + (epochs * rows - position) / batch
    if steps >= 2**63:
        raise UserError(f"--max_epochs={epochs:g}: too many steps to count")
    return max(step or 1, round(steps)) - 1


def resolve_precision(config, resolved, run):
    """(dtype, whether to compile): those of the resumed run if it was on the same type of device
    and they were not given now, else from the settings."""
    device, wanted = run.device, {"dtype": config.dtype, "compile": config.compile}
    if resolved.get("device") == device.type:
        wanted |= {key: resolved[key] for key in wanted if key in resolved}
    elif "device" in resolved:
        run.say(
            f"note: the checkpoint was trained on {resolved['device']}; "
            f"dtype and compile are chosen again for {device.type}"
        )
    dtype = wanted["dtype"]
    if dtype == "auto" and device.type == "cpu":
        dtype = cpu_training_dtype(config.batch_size, config.block_size, config.n_embd)
    elif dtype == "auto":
        dtype = device.dtype_name
    return run.ranks.broadcast(dtype), resolve_compile(wanted["compile"], device)
