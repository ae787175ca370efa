"""Train a GPT: from scratch, from a checkpoint, or from pretrained weights.

On one device:           python train.py config/train_shakespeare_char.py
On your own text:        python train.py --input=my.txt
On the GPUs of a node:   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import gc
import math
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from brisk.checkpoint import load_checkpoint
from brisk.data.loader import hash64, to_device
from brisk.distributed.broadcast import broadcast_checkpoint
from brisk.distributed.parallelize import (
    checkpoint_activations,
    clip_grad_norm,
    full_weights,
    set_grad_sync,
    wrap_model,
)
from brisk.distributed.process_group import clean_end
from brisk.errors import UserError, one_line_errors
from brisk.generation.preview import draw_samples
from brisk.reporting.forecast import Forecast
from brisk.training import own_text
from brisk.training.budget import fit_to_minutes, seconds_per_step
from brisk.training.compilation import compile_model
from brisk.training.cuda_graph import StepGraphs
from brisk.training.inputs import open_data
from brisk.training.memory import check_fits, peak_memory
from brisk.training.optim import get_lr, step_optimizer
from brisk.training.plan import make_plan
from brisk.training.resume import load_start, resolve, resumed_position
from brisk.training.run import Outcome, conclude, open_run, peak_flops_of
from brisk.training.spikes import SpikeWatch
from brisk.training.state import TrainState, checkpoint_header
from configurator import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    UnitFloat,
    check_values,
    configure,
    with_values,
)
from model import GPT, GPTConfig


@dataclass(frozen=True)
class TrainConfig(GPTConfig):
    # run
    out_dir: str = "out"  # output folder: checkpoints, metrics.jsonl, loss.png
    init_from: str = "scratch"  # scratch, resume, auto, gpt2*, a checkpoint, a Hugging Face folder
    eval_interval: PositiveInt = 2000  # steps between evaluations; each saves a checkpoint
    log_interval: PositiveInt = 1  # steps between lines of the training loss
    eval_iters: PositiveInt = 200  # batches of each split in an evaluation
    eval_only: bool = False  # evaluate once and stop; saves nothing
    always_save_checkpoint: bool = True  # ckpt.pt is the newest model; if False, the best one
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "owt"  # W&B project
    wandb_run_name: str = "gpt2"  # W&B run name
    tensorboard: bool = False  # log to out_dir/tensorboard
    eval_samples: NonNegativeInt = 0  # texts to sample and show at each evaluation
    eval_start: str = ""  # prompt of these texts
    keep_last: NonNegativeInt = 0  # also keep the newest saves as step-<step>.pt; 0: none
    patience: NonNegativeInt = 0  # evaluations without a lower val loss that end the run; 0: off
    dry_run: bool = False  # print the plan of the run, with its memory, and stop
    dry_run_world_size: NonNegativeInt = 0  # number of processes to plan for; 0: the actual number
    seed: Seed = 1337  # of initial weights, data order and dropout
    # data
    dataset: str = "openwebtext"  # train on data/<dataset>
    gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-batches in a step, over all ranks
    batch_size: PositiveInt = 12  # sequences in a micro-batch
    input: str = ""  # train on your own text: files or folders, separated by commas
    data_dir: str = ""  # folder of train.bin and val.bin, instead of data/<dataset>
    rows: Literal["windows", "documents"] = "windows"  # a sequence is any window, or one document
    verify_data: bool = False  # compare the data with the checksums in meta.json first
    # model
    vocab_size: NonNegativeInt = 0  # rows of the vocabulary; 0: as many as the tokenizer needs
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    freeze_layers: NonNegativeInt = 0  # keep the embeddings and the first n blocks fixed; 0: none
    # optimizer
    learning_rate: NonNegativeFloat = 6e-4  # peak learning rate
    max_iters: NonNegativeInt = 600000  # number of the last step, counted from 0
    weight_decay: NonNegativeFloat = 1e-1  # of matrices and embeddings
    beta1: UnitFloat = 0.9  # AdamW: decay of the mean gradient
    beta2: UnitFloat = 0.95  # AdamW: decay of the mean squared gradient
    grad_clip: NonNegativeFloat = 1.0  # largest gradient norm; 0: no clipping
    max_epochs: NonNegativeFloat = 0.0  # passes over the data, instead of max_iters
    minutes: NonNegativeFloat = 0.0  # train for about this long: measures speed, sets max_iters
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices
    muon_learning_rate: NonNegativeFloat = 0.02  # peak learning rate of Muon
    muon_momentum: UnitFloat = 0.95  # momentum of Muon
    # Where a loss or gradient is not finite: stop the run, skip the step, rewind to the newest
    # checkpoint and continue with other batches, or ignore it as nanoGPT does.
    on_spike: Literal["stop", "skip", "rewind", "ignore"] = "stop"  # at a non-finite step
    spike_factor: NonNegativeFloat = 0.0  # also at gradient norms above this many medians; 0: off
    # learning rate
    decay_lr: bool = True  # False: constant
    warmup_iters: NonNegativeInt = 2000  # steps of linear warm-up
    lr_decay_iters: NonNegativeInt = 600000  # step of min_lr; with max_epochs the last
    min_lr: NonNegativeFloat = 6e-5  # final learning rate, usually learning_rate / 10
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, linear decay
    decay_frac: UnitFloat = 0.2  # wsd: fraction of lr_decay_iters that decays
    # system
    backend: str = "auto"  # of torch.distributed: nccl, gloo or auto
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of autocast
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model
    cuda_graph: bool = False  # replay micro-batch and optimizer step as CUDA graphs: small models
    parallel: Literal["ddp", "fsdp"] = "ddp"  # replicate the state on all ranks, or shard it
    cpu_offload: bool = False  # fsdp: keep the shards in host memory
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    timeout: PositiveInt = 600  # seconds that a rank waits for another before it gives up

    given: tuple = field(default=(), compare=False)  # names of the keys that were set, in order

    # Of a start or of this machine: a resume does not take these from its checkpoint.
    start_keys = "out_dir", "init_from", "eval_only", "dry_run", "dry_run_world_size", "cuda_graph"
    start_keys += "input", "minutes", "verify_data", "device", "backend", "timeout", "cpu_offload"
    exclusive = (("max_iters", "max_epochs"),)  # in one config file


# The model's fields that a pretrained model decides; only block_size may be smaller.
CHANGEABLE = ("vocab_size", "dropout", "ngram_dropout")
SHAPE_KEYS = [field.name for field in fields(GPTConfig) if field.name not in CHANGEABLE]


def main(given, stop=None):
    """Train one model with the settings `given`, as `configure` returns them."""
    given = own_text.with_out_dir(given)
    with open_run(given, stop) as run:
        start = load_start(given, run.ranks)
        if given.input:
            given = with_values(given, own_text.settings(given, start, run))
        config = resolve(given, start, SHAPE_KEYS, run.log)
        check_values(config, "in the checkpoint")
        if config.minutes:
            config = fit_length(config, start, run)
            gc.collect()  # a compiled model is in a reference cycle
        data = open_data(config, start, run)
        state = initial_state(config, start, data, run)
        plan = make_plan(config, start, state, data, run)
        run.say("\n".join([*plan.lines, *own_text.command(config)]))
        if config.dry_run:
            return
        parallelize(state, config, plan, run)
        if start.saved:
            state.load_state_dict(start.checkpoint)
        if (end := plan.reason_to_end(state)) and not config.eval_only:
            run.say(f"the run is at its end: {end}")
            return
        run.open_folder(config, plan, resuming=start.saved is not None)
        del start  # free memory
        outcome = train(config, plan, state, data, run)
    conclude(outcome, config, state.best_val_loss, run)
    own_text.show_sample(config, run, Path(__file__).with_name("sample.py"))


def initial_state(config, start, data, run):
    """The `TrainState` of a start: the model on the CPU, step and position."""
    torch.manual_seed(config.seed)
    sharded_here = run.ranks.shards and not run.ranks.is_main  # receives its shards later
    dropouts = {"dropout": config.dropout, "ngram_dropout": config.ngram_dropout}
    if start.model_args is None or sharded_here:
        try:
            sizes = GPTConfig.from_settings(config, vocab_size=data.vocab_size)
        except ValueError as error:  # sizes that do not fit together
            raise UserError(str(error)) from error
        check_fits(sizes)
        model = GPT.uninitialized(sizes)
        if not sharded_here:
            model.init_weights()
    else:
        model = GPT.from_checkpoint(start.checkpoint, dropouts)
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    if config.freeze_layers > config.n_layer:
        raise UserError(f"--freeze_layers={config.freeze_layers}: the model has {config.n_layer}")
    model.freeze_layers(config.freeze_layers)
    state = TrainState(model, step=start.step)
    if start.saved:
        state.position = resumed_position(start.saved, config, data.identity, run.log)
    return state


def parallelize(state, config, plan, run):
    """Apply activation checkpointing, compilation and DDP or FSDP; create the optimizer."""
    if config.activation_checkpointing:
        for block in state.model.transformer.h:
            checkpoint_activations(block, config.dropout > 0)
    if plan.compile:
        blocks_only = run.ranks.shards or config.activation_checkpointing
        compile_model(state.model, config.batch_size * config.block_size, run.say, blocks_only)
    state.ddp_model = wrap_model(state.model, run.ranks, plan.device, config.cpu_offload)
    adamw = (config.weight_decay, config.learning_rate, (config.beta1, config.beta2))
    muon = (config.muon_learning_rate, config.muon_momentum, run.ranks)
    muon = muon if config.optimizer == "muon" else None
    state.optimizer = state.model.configure_optimizers(*adamw, plan.device.type, muon)
    state.scaler = plan.device.scaler()
    spikes = (config.on_spike, config.spike_factor, state.scaler.is_enabled())
    state.spikes = SpikeWatch(plan.device.device, *spikes)
    state.graphs = StepGraphs(state.optimizer, plan.device) if config.cuda_graph else None


def fit_length(config, start, run):
    """`config` with the number of steps that fit into `minutes`, measured on a throwaway model."""
    data = open_data(config, start, run)
    plan, _, step = throwaway_step(config, start, run, data)
    seconds = seconds_per_step(step, plan.device, run.ranks)
    return with_values(config, fit_to_minutes(config, plan, seconds, run.say))


def throwaway_step(config, start, run, data):
    """For measurements: the plan of a run, a state, and a function that trains it by one step."""
    state = initial_state(config, start, data, run)
    plan = make_plan(config, start, state, data, run)
    parallelize(state, config, plan, run)
    return plan, state, lambda: train_step(config, plan, state, data, run, Forecast.off(plan))


def train(config, plan, state, data, run):
    """The training loop: evaluate, save, step, log. Returns its `Outcome`."""
    device, ranks, log = plan.device, run.ranks, run.log
    peak_flops = peak_flops_of(run, device)  # of all ranks together
    forecast = Forecast.of(config, plan, run)
    header = checkpoint_header(config, plan, state, data)
    clipped = torch.zeros((), device=device.device)  # clipped steps since the last log line
    t0, steps_timed = time.perf_counter(), 0

    def save(is_best, losses=()):
        """Save last.pt, and ckpt.pt if this is the best model so far, or always."""
        as_best = is_best or config.always_save_checkpoint
        run.saver.save({**state.state_dict(), **header}, as_best, config.keep_last, losses)

    while True:
        step, finished = state.step, state.step > plan.last_step
        due = finished or step % config.eval_interval == 0
        evaluating = due or step == plan.first_step
        stopping = 0 if finished else run.stop_signal()

        # gradient spikes since the last check, read where the host waits for the device anyway
        if evaluating or stopping or device.type == "cpu" or (step - 1) % config.log_interval == 0:
            answer = state.spikes.respond(run.saver, ranks, log)
            if isinstance(answer, str):
                return Outcome(failure=answer)
            if answer:
                state.rewind(broadcast_checkpoint(ranks, load_checkpoint, answer), ranks)
                log.back_to(state.step)
                clipped.zero_()
                continue

        if (evaluating or stopping) and (lost := run.lost_folder(step)):
            return Outcome(failure=f"stopped at step {step} without saving: {lost}")

        # a signal to stop on any rank: save, and stop on all ranks
        if stopping:
            if step > plan.first_step:
                save(is_best=False)
            return Outcome(signal=stopping, saved_step=step if step > plan.first_step else None)

        # once in a while: evaluate, and save
        if evaluating:
            record = evaluate(config, plan, state, data, run, forecast, may_stop=not finished)
            if record is None:  # interrupted by a signal
                continue
            log.evaluation(step, record)
            losses = (record["train_loss"], record["val_loss"])
            # The extra evaluation at a resume must not change the run, so it is not counted; but
            # one that a signal interrupted is repeated at the resume, and then it is.
            is_best = due and losses[1] < state.best_val_loss
            state.best_val_loss = losses[1] if is_best else state.best_val_loss
            state.evals_since_best = 0 if is_best else state.evals_since_best + due
            if step > plan.first_step or (is_best and step and not config.eval_only):
                log.say(f"saving checkpoint to {config.out_dir}")
                save(is_best, losses)
            t0, steps_timed = time.perf_counter(), 0
        if (end := plan.reason_to_end(state)) or config.eval_only:
            return Outcome(reason="" if finished else end)

        lr = get_lr(step, config, plan.decay_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        step_loss, grad_norm = train_step(config, plan, state, data, run, forecast)
        clipped += grad_norm > (config.grad_clip or math.inf)  # stays on the device

        # once in a while: a line of the loss
        steps_timed += 1
        if step % config.log_interval == 0:
            # one read of the device, which waits for it
            loss, norm, steps_clipped = torch.stack((step_loss, grad_norm, clipped)).tolist()
            seconds = (time.perf_counter() - t0) / steps_timed
            record = {
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "clipped": steps_clipped / min(config.log_interval, step - plan.first_step + 1),
                "step_ms": seconds * 1000,
                "tokens_per_second": plan.global_batch * config.block_size / seconds,
                "mfu": state.model.estimate_mfu(plan.global_batch, seconds, peak_flops),
                "memory": peak_memory(device),
                "tokens": state.position * config.block_size,
            }
            clipped.zero_()
            log.iteration(step, record)
            t0, steps_timed = time.perf_counter(), 0
        log.advance()


def train_step(config, plan, state, data, run, forecast):
    """One optimizer step on the global batch at `state.position`. Returns its loss and the norm of
    its gradient before clipping, tensors () on the device."""
    device, ranks = plan.device, run.ranks

    def forward_backward(x, y, weight):
        with device.autocast():
            _, loss = state.ddp_model(x, y, return_logits=False)
        # DDP and FSDP average gradients over the ranks, but `weight` is a fraction of the global
        # batch: multiplying by world_size turns the average into the sum.
        state.scaler.scale(loss * (weight * ranks.world_size)).backward()
        return loss.detach() * weight

    def update(step_loss):
        state.scaler.unscale_(state.optimizer)
        grad_norm = clip_grad_norm(state.model, config.grad_clip or math.inf, ranks, device)
        limit, is_spike = state.spikes.check(step_loss, grad_norm)
        step_optimizer(state.optimizer, state.scaler, is_spike)
        state.optimizer.zero_grad(set_to_none=state.graphs is None)
        return grad_norm, limit

    if state.graphs:  # the same, with one launch each
        forward_backward, update = state.graphs.of(forward_backward, update)
    step_targets = data.train.targets(state.position, plan.global_batch)
    step_loss = torch.zeros((), device=device.device)
    for index, first, count in forecast.timed("micro-batch", plan.micro_batches):
        batch = to_device(data.train.batch(state.position + first, count), device)
        weight = data.train.targets(state.position + first, count) / step_targets
        torch.manual_seed(hash64(config.seed, state.step, index))  # dropout: resume is exact
        # Accumulate gradients locally; average them over the ranks in the last micro-batch only.
        set_grad_sync(state.ddp_model, ranks, sync=index == plan.micro_batches[-1][0])
        step_loss += forward_backward(*batch, weight)
    grad_norm, limit = update(ranks.all_reduce_sum(step_loss))
    state.spikes.record(state.step, state.position, step_loss, grad_norm, limit)
    state.position += plan.global_batch
    state.step += 1
    return step_loss, grad_norm


def evaluate(config, plan, state, data, run, forecast, may_stop):
    """Losses of both splits and, with `eval_samples`, texts, for `RunLog.evaluation`. None if a
    signal interrupted it, which only `may_stop` allows."""
    state.model.eval()
    record = {
        f"{split}_loss": estimate_loss(state.model, tokens, config, plan, run, forecast, may_stop)
        for split, tokens in data.evaluated.items()
    }
    if may_stop and run.stop_signal():
        return None
    record["tokens"] = state.position * config.block_size
    if data.prompt:
        with full_weights(state.model, run.ranks):
            if run.ranks.is_main:
                drawn = (state.model, data.tokenizer, data.prompt, config, plan.device)
                record["samples"] = draw_samples(*drawn)
    state.model.train()
    return record


@torch.no_grad()
def estimate_loss(model, tokens, config, plan, run, forecast, may_stop=False):
    """Mean loss in nats per token over `eval_iters` batches of `tokens`, the same ones every time.
    With `may_stop`, a signal interrupts it."""
    device, ranks = plan.device, run.ranks
    float64 = torch.float32 if device.type == "mps" else torch.float64  # MPS has none
    nats, count = torch.zeros(2, dtype=float64, device=device.device).unbind()
    for first in forecast.timed("evaluation", range(0, config.eval_iters, ranks.world_size)):
        if may_stop and run.stop_signal():
            break
        k = first + ranks.rank  # ranks without a batch left compute one that is not counted
        position = k % config.eval_iters * config.batch_size
        batch = to_device(tokens.batch(position, config.batch_size), device)
        targets = tokens.targets(position, config.batch_size) * (k < config.eval_iters)
        with device.autocast():
            _, loss = model(*batch, return_logits=False)
        nats += loss * targets
        count += targets
    return (ranks.all_reduce_sum(nats) / ranks.all_reduce_sum(count)).item()


if __name__ == "__main__":
    with clean_end(), one_line_errors():
        main(configure(TrainConfig, sys.argv[1:]))
