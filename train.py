"""Train a GPT, from scratch or from what is there already.

On one device:           python train.py config/train_shakespeare_char.py
With keys overridden:    python train.py config/train_shakespeare_char.py --batch_size=32
On the GPUs of a node:   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
Weights shared out too:  torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
On two nodes, on each:   torchrun --nnodes=2 --node_rank=<0 or 1> --master_addr=<address of node 0>
                         --master_port=1234 --nproc_per_node=8 train.py config/train_gpt2.py
What a run would do:     python train.py config/train_gpt2.py --dry_run=True
"""

import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from brisk.checkpoint import drop_unfinished, load_checkpoint, set_aside
from brisk.corpus import load_tokenizer, read_meta, verify_data
from brisk.device import open_device
from brisk.distributed import Ranks, clean_end
from brisk.errors import UserError, one_line_errors
from brisk.handing import handed_out
from brisk.joining import lost_peers
from brisk.loader import TokenFile, find_data_dir, hash64, to_device
from brisk.lock import FolderLock
from brisk.memory import check_fits, expected_memory, in_bytes, peak_memory, shared_state
from brisk.optim import learning_rate_at, load_optimizer, load_scaler, step_unless
from brisk.plan import global_batch, make_plan
from brisk.preview import draw_samples, sample_prompt
from brisk.recompute import recompute_in_backward
from brisk.runlog import Forecast, RunLog
from brisk.saving import Saver
from brisk.spikes import SpikeWatch
from brisk.starting import (
    SavedRun,
    describe_tokenizer,
    identity,
    resumed_config,
    starting_point,
)
from brisk.stopping import stop_requests
from configurator import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    UnitFloat,
    as_dict,
    check_values,
    configure,
)
from model import GPT, GPTConfig


@dataclass
class TrainConfig(GPTConfig):
    # the run
    out_dir: str = "out"  # folder of the run: checkpoints, metrics.jsonl and loss.png
    init_from: str = "scratch"  # scratch, resume, auto, gpt2*, a Hugging Face folder, a checkpoint
    eval_interval: PositiveInt = 2000  # steps between evaluations, each with a save
    log_interval: PositiveInt = 1  # steps between lines of the training loss
    eval_iters: PositiveInt = 200  # batches of each split in an evaluation
    eval_samples: NonNegativeInt = 0  # texts to draw and show at each evaluation
    eval_start: str = ""  # what they begin with
    eval_only: bool = False  # evaluate once and stop; saves nothing
    always_save_checkpoint: bool = True  # ckpt.pt is the newest model instead of the best
    keep_checkpoints: NonNegativeInt = 0  # newest saves kept as step-<step>.pt too; 0 for none
    dry_run: bool = False  # say what the run would do and stop
    dry_run_ranks: NonNegativeInt = 0  # as if by so many processes; 0: by those there are
    seed: Seed = 1337  # of the weights, the order of the data, and dropout
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its name for the run
    tensorboard: bool = False  # log to out_dir/tensorboard
    # data
    dataset: str = "openwebtext"  # train on data/<dataset>
    data_dir: str = ""  # folder of train.bin and val.bin, instead of data/<dataset>
    verify_data: bool = False  # read all of both first and compare it with meta.json's checksums
    rows: Literal["windows", "documents"] = "windows"  # a row is any window, or one document
    gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-batches in a step, over all ranks
    batch_size: PositiveInt = 12  # sequences in a micro-batch
    # model: all fields of GPTConfig, with these defaults
    vocab_size: NonNegativeInt = 0  # rows of the vocabulary; 0: as the tokenizer needs
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # optimizer
    freeze_layers: NonNegativeInt = 0  # first blocks that do not learn, nor do the embeddings then
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW the rest
    learning_rate: NonNegativeFloat = 6e-4  # the largest
    muon_learning_rate: NonNegativeFloat = 0.02  # of muon's matrices where AdamW's is the largest
    muon_momentum: UnitFloat = 0.95  # decay of the mean of their gradients
    max_iters: NonNegativeInt = 600000  # the last step's number, counted from 0
    max_epochs: NonNegativeFloat = 0.0  # passes over the data; of it and max_iters the later counts
    weight_decay: NonNegativeFloat = 1e-1  # of matrices and embeddings
    beta1: UnitFloat = 0.9  # decay of the mean of the gradients
    beta2: UnitFloat = 0.95  # decay of the mean of their squares
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 for any
    # a loss or gradient that is no number: stop; skip its step; go back to the last checkpoint and
    # on with other batches; or train on as nanoGPT does
    on_spike: Literal["stop", "skip", "rewind", "ignore"] = "stop"  # what to do at such a step
    spike_factor: NonNegativeFloat = 0.0  # also for norms this many times the median; 0: any norm
    # learning-rate schedule: warm-up, then a cosine, or a constant rate and a line down at the end
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    decay_share: UnitFloat = 0.2  # of lr_decay_iters, in which wsd goes down to min_lr
    decay_lr: bool = True  # False: a constant rate
    warmup_iters: NonNegativeInt = 2000  # steps of warm-up
    lr_decay_iters: NonNegativeInt = 600000  # step of min_lr; with max_epochs the last by default
    min_lr: NonNegativeFloat = 6e-5  # the smallest rate, usually learning_rate / 10
    # system
    backend: str = "auto"  # between processes: nccl, gloo, or auto
    timeout: PositiveInt = 600  # seconds that one of them waits for another, before it gives up
    device: str = "auto"  # cpu, cuda, cuda:1, mps, or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the products
    compile: bool | Literal["auto"] = "auto"  # compile the blocks with torch.compile
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has the whole state, or a part of it
    cpu_offload: bool = False  # with fsdp: keep the parts on the host, less memory and slower
    activation_checkpointing: bool = False  # compute blocks again in backward: less memory

    # Of a start or of this machine: a resume does not take these from its checkpoint. All other
    # keys are the run's; dtype and compile stay as they were resolved.
    start_keys = ("out_dir", "init_from", "eval_only", "dry_run", "dry_run_ranks", "verify_data")
    start_keys += ("device", "backend", "timeout", "cpu_offload")
    exclusive = (("max_iters", "max_epochs"),)  # in one config file


# The model's fields that a checkpoint decides; only block_size may be given smaller.
SHAPE_KEYS = [f.name for f in fields(GPTConfig) if f.name not in ("dropout", "ngram_dropout")]
RUN_FILES = ("ckpt.pt", "last.pt", "metrics.jsonl", "loss.png", "tensorboard", "wandb", "step-*.pt")


def main(config, stop=None):
    """One run. However it ends, the last write is finished and the folder given back."""
    with lost_peers(), ExitStack() as at_end:
        train(config, stop, at_end)


def train(config, stop, at_end):
    # --- who and where we are
    if config.dry_run_ranks and not config.dry_run:
        raise UserError("--dry_run_ranks goes with --dry_run=True; torchrun starts processes")
    if not config.out_dir:
        raise UserError("--out_dir= is empty; name a folder for the run")
    ranks = Ranks.from_environment(config.parallel)
    device = open_device(config.device, config.dtype, None if ranks.is_alone else ranks.local_rank)
    ranks.join(config.backend, device, config.timeout)
    stop = stop or at_end.enter_context(stop_requests())  # up to here there is nothing to finish
    log = RunLog(active=ranks.is_main)
    lock = at_end.enter_context(FolderLock(config.out_dir, ranks))
    if not (config.eval_only or config.dry_run):
        lock.take()  # before anything is read that another run may be writing

    # --- where we start: nothing, a checkpoint (its settings hold unless given anew), or GPT-2
    checkpoint, resuming = starting_point(config, ranks)
    saved, step = None, 0
    if resuming:
        saved, step = SavedRun.of(checkpoint, config.given), checkpoint["iter_num"]
        config = resumed_config(config, checkpoint, saved, SHAPE_KEYS, log)
        check_values(config, "in the checkpoint")
        log.say(f"Resuming training from {config.out_dir} at step {step}")
    if config.cpu_offload and not config.dry_run:
        ranks.check_offload(device)

    # --- data
    data_dir = find_data_dir(config.data_dir, config.dataset)
    meta, tokenizer = read_meta(data_dir), load_tokenizer(data_dir)
    if config.verify_data:
        verify_data(data_dir, meta)
    if tokenizer is None:
        log.say("no tokenizer described with the data: taking it for GPT-2's")
    saved_tokenizer = describe_tokenizer(tokenizer, checkpoint, data_dir, log)
    prompt = sample_prompt(config, tokenizer, log)  # None: no texts at evaluations

    # --- model
    torch.manual_seed(config.seed)
    model = ranks.build(lambda: build_model(config, checkpoint, tokenizer))
    config = with_shape_of(model, config)
    if config.freeze_layers > config.n_layer:
        raise UserError(f"--freeze_layers={config.freeze_layers}: there are {config.n_layer}")
    if config.freeze_layers:
        model.freeze_layers(config.freeze_layers)
    log.say(f"number of parameters: {model.get_num_params() / 1e6:.2f}M")
    if config.ngrams > 1:
        log.say(f"and of n-grams: {model.transformer.ngrams.weight.numel() / 1e6:.2f}M")

    def open_tokens(split, evenly=0):
        dtype = meta["dtype"] if meta else "uint16"
        sizes = (config.block_size, model.config.vocab_size, dtype)
        eot = tokenizer.eot if tokenizer else 50256
        path = data_dir / f"{split}.bin"
        return TokenFile(path, *sizes, config.seed, config.rows, eot, evenly)

    train_data = open_tokens("train")
    eval_rows = config.eval_iters * config.batch_size
    eval_data = [open_tokens(split, eval_rows) for split in ("train", "val")]
    log.say(f"data: {data_dir}, {len(train_data.tokens):,} training tokens")

    # --- what follows from all this: how many steps, in what precision
    data = identity(meta, len(train_data.tokens))
    plan = make_plan(config, saved, step, (train_data.rows, data), device, ranks, log)
    device = replace(device, dtype_name=plan.dtype)
    share = ranks.share(config.gradient_accumulation_steps, config.batch_size)
    sequences = global_batch(config)
    say_plan(config, plan, model, train_data.rows, ranks, device, log)
    if config.dry_run:
        return ranks.leave()

    # --- on the device, as it is trained, and its optimizer
    for block in model.transformer.h:
        if config.activation_checkpointing:
            recompute_in_backward(block, config.dropout > 0)
        if plan.compile:
            block.compile()  # in place: names of weights stay as they are
    trained = ranks.wrap(model, device, config.cpu_offload)
    betas = (config.beta1, config.beta2)
    muon = (config.muon_learning_rate, config.muon_momentum, ranks)
    optimizer = model.configure_optimizers(
        config.weight_decay,
        config.learning_rate,
        betas,
        device.type,
        muon if config.optimizer == "muon" else None,
    )
    scaler = device.scaler()
    watch = SpikeWatch(device.device, config.on_spike, config.spike_factor, scaler.is_enabled())

    def load_state(checkpoint):
        """What goes with the weights; returns the step, and the best loss in validation so far."""
        load_optimizer(optimizer, checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint.get("scaler"):
            load_scaler(scaler, checkpoint["scaler"])
        watch.load(checkpoint.get("grad_norms"))
        return checkpoint["iter_num"], float(checkpoint["best_val_loss"])

    first_step, position, best_val_loss = step, plan.position, float("inf")
    if resuming:
        step, best_val_loss = load_state(checkpoint)
        if step > plan.last_step and not config.eval_only:
            log.say(f"the run is at its end: step {step} is past the last one ({plan.length})")
            return ranks.leave()
    checkpoint = None  # free memory

    # --- from here on there is something to keep
    saver = at_end.enter_context(Saver(config.out_dir, log.say, ranks.is_main))
    if not config.eval_only:
        lock.take(make=True)
    if ranks.is_main and not config.eval_only:
        drop_unfinished(config.out_dir)
        if not resuming and (folder := set_aside(config.out_dir, RUN_FILES)):
            log.say(f"moved an earlier run's files to {folder}")
        wandb = (config.wandb_project, config.wandb_run_name) if config.wandb_log else None
        settings = {**as_dict(config), "resolved": plan.resolved}
        log.open(config.out_dir, step, plan.last_step, settings, config.tensorboard, wandb)
    peak_flops, peak_name = device.peak_flops() if ranks.is_main else (1.0, "")
    peak_flops *= ranks.world_size
    log.say(f"mfu is a share of {peak_flops / 1e12:.3g} TFLOP/s, {peak_name}")

    steps_left = plan.last_step + 1 - step
    evaluations = 1 if config.eval_only else steps_left // config.eval_interval + 2
    eval_batches = math.ceil(2 * config.eval_iters / ranks.world_size)
    steps_left = 0 if config.eval_only else steps_left
    forecast = Forecast(log.say, steps_left, len(share), evaluations, eval_batches)

    def save(step, is_best, losses=()):
        """`last.pt` always; `ckpt.pt` too where this is the best so far, or always."""
        state = {
            "model": model.state_dict(keep_vars=True),  # a weight of two names is one
            "optimizer": optimizer.state_dict(),
            "model_args": model.config.to_args(),
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": as_dict(config),
            "given": config.given,
            "resolved": plan.resolved,
            "data": data,
            "position": position,
            "scaler": scaler.state_dict(),
            "tokenizer": saved_tokenizer,
            "grad_norms": watch.norms,
        }
        as_best = is_best or config.always_save_checkpoint
        saver.save(state, as_best, config.keep_checkpoints, losses)

    # --- the training loop
    lap, lap_steps, warned = time.perf_counter(), 0, False
    clipped = torch.zeros((), device=device.device)  # steps since the last line that were
    while True:
        finished = step > plan.last_step
        due = step % config.eval_interval == 0 or finished
        evaluating = due or step == first_step
        stopping = 0 if finished else ranks.largest(stop.number or 0)

        # steps that would spoil the run are read where the device is waited for anyway
        if evaluating or stopping or device.type == "cpu" or (step - 1) % config.log_interval == 0:
            if path := watch.way_back(saver, ranks, log):
                checkpoint = handed_out(ranks, load_checkpoint, path)
                ranks.load_weights(model, checkpoint["model"])
                step, best_val_loss = load_state(checkpoint)  # but position moves on
                log.back_to(step)
                clipped.zero_()
                continue

        if stopping:
            if step > first_step:
                save(step, is_best=False)
            log.close()
            saver.leave(ranks)
            if step > first_step:
                log.say(f"saved step {step} to {config.out_dir}; --init_from=resume goes on")
            sys.exit(128 + stopping)
        if evaluating:
            model.eval()
            train_loss, val_loss = (
                estimate_loss(model, data, config, ranks, device, forecast, not finished and stop)
                for data in eval_data
            )
            if not finished and ranks.largest(stop.number or 0):  # it was cut short
                continue
            record = {"train_loss": train_loss, "val_loss": val_loss}
            record["tokens"] = position * config.block_size
            if prompt:
                with ranks.whole_weights(model):
                    if ranks.is_main:
                        record["samples"] = draw_samples(model, tokenizer, prompt, config, device)
            log.evaluation(step, record)
            model.train()
            # One that only a resume makes changes nothing. One that was cut short by a stop is made
            # up for here: its model is saved if it is the best.
            is_best = due and val_loss < best_val_loss
            best_val_loss = val_loss if is_best else best_val_loss
            if step > first_step or (is_best and step and not config.eval_only):
                log.say(f"saving checkpoint to {config.out_dir}")
                save(step, is_best, (train_loss, val_loss))
            lap, lap_steps = time.perf_counter(), 0
        if finished or config.eval_only:
            break

        lr = learning_rate_at(step, config, plan.decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

        # forward and backward through this process's share of the global batch
        step_targets = train_data.targets(position, sequences)
        step_loss = torch.zeros((), device=device.device)
        for number, (index, first, count) in enumerate(share):
            began = time.perf_counter()
            batch = to_device(train_data.batch(position + first, count), device)
            weight = train_data.targets(position + first, count) / step_targets
            torch.manual_seed(hash64(config.seed, step, index))  # of dropout
            ranks.average_gradients(trained, now=number == len(share) - 1)
            with device.autocast():
                _, loss = trained(*batch, return_logits=False)
            step_loss += loss.detach() * weight
            scaler.scale(loss * (weight * ranks.world_size)).backward()
            if not forecast.is_complete:
                device.synchronize()
                forecast.micro_batch(time.perf_counter() - began)
        ranks.sum(step_loss)

        scaler.unscale_(optimizer)
        limit = config.grad_clip or float("inf")
        grad_norm = ranks.clip_gradients(model, limit, device)
        clipped += grad_norm > limit  # on the device, which need not wait
        broken = watch.look(step, position, step_loss, grad_norm)
        if config.on_spike == "skip":
            step_unless(broken, optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        position += sequences

        lap_steps += 1
        if step % config.log_interval == 0:
            loss = step_loss.item()  # waits for the device
            seconds = (time.perf_counter() - lap) / lap_steps
            record = {
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "clipped": clipped.item() / min(config.log_interval, step - first_step + 1),
                "step_ms": seconds * 1000,
                "tokens_per_second": sequences * config.block_size / seconds,
                "mfu": model.estimate_mfu(sequences, seconds, peak_flops),
                "memory": peak_memory(device),
                "tokens": position * config.block_size,
            }
            clipped.zero_()
            log.iteration(step, record)
            if not math.isfinite(loss) and not warned:
                log.say("the loss is no number any more: try a lower --learning_rate")
                warned = True
            lap, lap_steps = time.perf_counter(), 0
        step += 1
        log.advance()

    log.close()
    saver.leave(ranks)
    if not config.eval_only:
        peak = peak_memory(device)
        log.say(
            f"best val loss {best_val_loss:.4f}"
            + (f", memory at its peak {in_bytes(peak)}" if peak else "")
        )
        left = [name for name in RUN_FILES if Path(config.out_dir, name).exists()]
        log.say(f"{config.out_dir} has {', '.join(left)}; read what the model writes:")
        log.say(f"  python sample.py --out_dir={config.out_dir}")


def with_shape_of(model, config):
    """The settings with the shape that `model` has: it may come from a checkpoint or GPT-2."""
    shaped = replace(config, **{key: getattr(model.config, key) for key in SHAPE_KEYS})
    shaped.given = config.given
    return shaped


def say_plan(config, plan, model, rows, ranks, device, log):
    """What is about to happen: steps and tokens, over how many of the data's `rows`, where, and in
    how much memory."""
    tokens, steps = global_batch(config) * config.block_size, plan.last_step + 1
    epochs = global_batch(config) * steps / rows
    log.say(f"tokens per iteration will be: {tokens:,}")
    log.say(f"plan: {steps:,} steps, {steps * tokens:,} tokens, {epochs:.3g} epochs")
    planned = replace(ranks, world_size=config.dry_run_ranks or ranks.world_size)
    micro_batches = planned.share(config.gradient_accumulation_steps, config.batch_size)
    memory = expected_memory(
        model,
        max(count for _, _, count in micro_batches),
        device,
        recomputed=config.activation_checkpointing,
        ranks=planned,
        accumulates=len(micro_batches) > 1,
        offload=config.cpu_offload,
    )
    compiled = "compiled" if plan.compile else "not compiled"
    processes = f"{planned.world_size} processes ({config.parallel}), each on "
    where = f"{'' if planned.is_alone else processes}{device}, {compiled}"
    log.say(f"device: {where}; about {in_bytes(memory)} of memory for training")
    if config.cpu_offload:
        log.say(f"and {in_bytes(shared_state(model, planned))} of the host's for each process")


@torch.no_grad()
def estimate_loss(model, data, config, ranks, device, forecast, stop=None):
    """Mean loss in nats a token over the same `eval_iters` batches of `data` every time. A request
    to stop cuts it short."""
    precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    nats, tokens = torch.zeros(2, dtype=precise, device=device.device).unbind()
    for first in range(0, config.eval_iters, ranks.world_size):
        if stop and ranks.largest(stop.number or 0):
            break
        began = time.perf_counter()
        k = first + ranks.rank  # the last ones may have none left: they run along, uncounted
        position = k % config.eval_iters * config.batch_size
        batch = to_device(data.batch(position, config.batch_size), device)
        targets = data.targets(position, config.batch_size) * (k < config.eval_iters)
        with device.autocast():
            _, loss = model(*batch, return_logits=False)
        nats += loss * targets
        tokens += targets
        if not forecast.is_complete:
            device.synchronize()
            forecast.evaluation_batch(time.perf_counter() - began)
    return (ranks.sum(nats) / ranks.sum(tokens)).item()


def vocabulary_rows(tokenizer):
    """Rows of a new model's vocabulary: characters, bytes and words as they are; byte pairs
    rounded up to a multiple of 64, which is faster (GPT-2's 50257 become 50304)."""
    if tokenizer is None:
        return 50304
    return -(-tokenizer.vocab_size // 64) * 64 if tokenizer.kind == "bpe" else tokenizer.vocab_size


def build_model(config, checkpoint, tokenizer):
    """The model that `init_from` asks for, on the CPU."""
    dropouts = {"dropout": config.dropout, "ngram_dropout": config.ngram_dropout}
    if checkpoint is not None:
        model = GPT.from_checkpoint(checkpoint, dropouts)
    elif config.init_from in ("scratch", "auto"):
        rows = config.vocab_size or vocabulary_rows(tokenizer)
        if tokenizer and rows < tokenizer.vocab_size:
            raise UserError(f"--vocab_size={rows}: the tokenizer has {tokenizer.vocab_size} tokens")
        try:
            sizes = GPTConfig.from_settings(config, vocab_size=rows)
        except ValueError as error:  # sizes that do not go together
            raise UserError(str(error)) from error
        check_fits(sizes)
        model = GPT.empty(sizes)
        model.init_weights()
        return model
    else:
        model = GPT.from_pretrained(config.init_from, dropouts)
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    elif config.block_size > model.config.block_size and "block_size" in config.given:
        limit = model.config.block_size
        raise UserError(f"--block_size={config.block_size}: {config.init_from} has only {limit}")
    return model


if __name__ == "__main__":
    with clean_end(), one_line_errors():
        main(configure(TrainConfig, sys.argv[1:]))
