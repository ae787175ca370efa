"""A training step of GPT-2's size (124M), and its parts."""

import os
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from brisk.training.loss import linear_cross_entropy
from gpu_sections.job import (
    GPT2,
    PADDED,
    Worker,
    free_port,
    peak_gigabytes,
    row,
    step_job,
    take_turns,
)
from gpu_sections.kernels import kernel_table
from trainer import open_trainer


def step(job):
    """Steps of 12x1024 tokens on both sides, and starts with a cold and a warm compile cache."""
    batch_size, caches = job.pick(12, 2), {}
    settings = step_job(job, GPT2, batch_size)
    workers, sides = {}, job.sides()
    for name, side in sides.items():
        cache = job.folder / f"compiled-{name}"
        both = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        caches[name] = {**os.environ, **both}
        workers[name] = Worker(side, settings, caches[name])
    rounds = take_turns(job, workers)
    yield from rows_of_steps(job, f"124M, {batch_size}x{settings['model_args']['block_size']}",
                             rounds, settings)  # fmt: skip
    starts = {"cold": {name: rounds[name][0]["first_s"] for name in sides}, "warm": {}}
    for name, side in sides.items():
        worker = Worker(side, {**settings, "warm_up": 1, "steps": 1}, caches[name])
        starts["warm"][name] = worker.figures()["first_s"]
        worker.close()
    for cache, found in starts.items():
        peer = [found["nanogpt"]] if "nanogpt" in found else None
        yield row(f"to the end of the first step, {cache} cache", "s", [found["brisk"]], peer)


def rows_of_steps(job, what, rounds, settings):
    """Yield a row of times and a row of memory for the rounds of `take_turns`."""
    args, tokens = (
        settings["model_args"],
        settings["batch_size"] * settings["model_args"]["block_size"],
    )
    times = {name: [1000 * figures["seconds"] for figures in rounds[name]] for name in rounds}
    last = {name: figures[-1] for name, figures in rounds.items()}
    more = {f"loss, {name}": last[name]["loss"] for name in last}
    more["tokens/s"] = tokens / min(times["brisk"]) * 1000
    more |= {} if args["n_embd"] < 768 else mfu(job, args, settings["batch_size"], times["brisk"])
    yield row(f"step, {what}", "ms", times["brisk"], times.get("nanogpt"), **more, **job.clocks)
    if job.on_gpu:
        gigabytes = {name: [figures["bytes"] / 1e9] for name, figures in last.items()}
        reserved = {f"reserved GB, {k}": (f["reserved"] or 0) / 1e9 for k, f in last.items()}
        yield row(f"memory, {what}", "GB", gigabytes["brisk"], gigabytes.get("nanogpt"), **reserved)


def mfu(job, args, batch_size, times):
    """MFU of the median step, with the model's own FLOP count."""
    from model import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(**args))
    peak, source = job.device.peak_flops()
    share = model.estimate_mfu(batch_size, sorted(times)[len(times) // 2] / 1000, peak)
    return {"MFU": share, "of": source}


def batches(job):
    """Our step with larger batches, to find the best MFU."""
    for batch_size in job.pick([24, 32, 64], [3]):
        job.clean_up()
        with open_trainer(job.argv(GPT2, batch_size)) as trainer:
            times = job.time_steps(trainer.step)
            args = {**vars(trainer.state.model.config)}
            more = mfu(job, args, batch_size, times) | peak_gigabytes(job.device)
            more["tokens/s"] = trainer.tokens / sorted(times)[len(times) // 2] * 1000
            yield row(f"step, 124M, {batch_size}x{args['block_size']}", "ms", times, **more)


def ddp(job):
    """A step of one process with DDP, and without it (in place of nanoGPT)."""
    settings, side = step_job(job, GPT2, job.pick(12, 2)), job.sides()["brisk"]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = {
        "ddp": Worker(side, settings, {**os.environ, **alone}),
        "none": Worker(side, settings),
    }
    rounds = take_turns(job, workers)
    ours, plain = ([1000 * f["seconds"] for f in rounds[name]] for name in ("ddp", "none"))
    cost = sorted(a / b - 1 for a, b in zip(ours, plain, strict=True))[len(ours) // 2]
    more = {"a plain step ms": sorted(plain)[len(plain) // 2], "costs": f"{cost:+.1%}"}
    yield row("step of one process in DDP", "ms", ours, **more)


def loss(job):
    """Head and loss, forward and backward, of 12x1024 tokens: chunked, and all logits at once, each
    also compiled."""
    N, V, C = job.pick((12 * 1024, PADDED, 768), (64, 61, 16))
    x = torch.randn(N, C, device=job.device.device, requires_grad=True)
    weight = torch.randn(V, C, device=job.device.device).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=job.device.device)

    def whole(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    forms = {f"ours, {2**k >> 20} M logits at a time": partial(linear_cross_entropy, chunk=2**k)
             for k in job.pick((23, 24, 25, 26, 27, 30), (20,))}  # fmt: skip
    forms["all logits at once"] = whole
    if job.on_gpu:
        forms["all logits at once, compiled"] = torch.compile(whole)
        forms["ours, compiled"] = torch.compile(linear_cross_entropy)
    for what, form in forms.items():
        job.clean_up()

        def once(form=form):
            with job.device.autocast():
                value = form(x, weight, targets)
            torch.autograd.grad(value, (x, weight))

        try:
            yield row(f"loss, {what}", "ms", job.time_steps(once), **peak_gigabytes(job.device))
        except Exception as error:  # a form may not compile; the others are as good
            reason = (str(error).splitlines() or [""])[0]
            yield {"what": f"loss, {what}", "failed": f"{type(error).__name__}: {reason}"}


def attention(job):
    """Causal attention of one layer, forward and backward, with each of PyTorch's kernels."""
    B, H, T, D = job.pick((12, 12, 1024, 64), (1, 2, 16, 8))
    dtype = job.device.dtype
    q, k, v = (
        torch.randn(B, H, T, D, device=job.device.device, dtype=dtype, requires_grad=True)
        for _ in "qkv"
    )
    gradient = torch.randn_like(q)
    flops = 3.5 * 4 * B * H * T * T * D / 2  # of two products forward and five backward, by halves
    kernels = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
    kernels |= {"memory-efficient": "EFFICIENT_ATTENTION", "math": "MATH", "as chosen": None}
    for what, name in kernels.items() if job.on_gpu else [("math", "MATH"), ("as chosen", None)]:
        backends = (
            list(SDPBackend.__members__.values()) if name is None else getattr(SDPBackend, name)
        )
        if name is None:
            backends = [b for b in backends if b.name not in ("ERROR", "OVERRIDEABLE")]

        def once(backends=backends):
            with sdpa_kernel(backends):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), gradient)

        try:
            times = job.time_steps(once)
            yield row(f"attention, {what}", "ms", times, **{"TFLOP/s": flops / min(times) / 1e9})
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            yield {"what": f"attention, {what}", "failed": reason}


def kernels(job):
    """The kernels of one step by their time."""
    with open_trainer(job.argv(GPT2, job.pick(12, 2))) as trainer:
        for _ in range(job.warm_up):
            trainer.step()
        yield from kernel_table(trainer.step, job.device)


def xl(job):
    """gpt2-xl in one process with activation checkpointing, limited to 80 GB."""
    sizes = {**GPT2, "n_layer": 48, "n_head": 25, "n_embd": 1600}
    keys = {"activation_checkpointing": True}
    if job.on_gpu:
        total = torch.cuda.get_device_properties(job.device.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 80e9 / total))
    steps, job.steps = job.steps, job.pick(5, 2)
    try:
        for batch_size in job.pick([16, 32], [2]):
            job.clean_up()
            with open_trainer(job.argv(sizes, batch_size, **keys)) as trainer:
                times = job.time_steps(trainer.step)
                args = {**vars(trainer.state.model.config)}
                more = mfu(job, args, batch_size, times) | peak_gigabytes(job.device)
                more["expected"] = trainer.plan.lines[-1].partition("about ")[2]
                more["tokens/s"] = trainer.tokens / sorted(times)[len(times) // 2] * 1000
                yield row(f"step, gpt2-xl, {batch_size}x{args['block_size']}", "ms", times, **more)
    finally:
        job.steps = steps
        if job.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


PARTS = {"step": step, "batches": batches, "ddp": ddp, "attention": attention, "loss": loss}
PARTS |= {"kernels": kernels, "xl": xl}
