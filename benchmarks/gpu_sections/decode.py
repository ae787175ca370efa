"""Sampling from a network of GPT-2's size (124M)."""

from gpu_sections.job import GPT2, Worker, row, take_turns
from sides import save_random_model


def generate_job(job):
    """Settings of a "generate" job of one_side.py, and its number of tokens in a sample."""
    args, tokens = job.model_args({**GPT2, "vocab_size": 50257}), job.pick(200, 12)
    weights = job.folder / "decode.pt"
    save_random_model(args, weights)
    settings = {"job": "generate", "model_args": args, "weights": str(weights), "tokens": tokens}
    return {**settings, "device": str(job.device.device)}, tokens


def samples(job):
    """Tokens per second of `model.generate`: one sample, and many; nanoGPT's one after another, as
    in its sample.py, and as one batch."""
    settings, tokens = generate_job(job)
    many = job.pick(64, 3)
    cases = {  # what → (samples drawn, side by side) of ours, and of nanoGPT
        "1 sample": ((1, 1), (1, 1)),
        f"{many} samples, nanoGPT's one after another": ((many, many), (2, 1)),
        f"{many} samples, nanoGPT's as one batch": ((many, many), (many, many)),
    }
    for what, counts in cases.items():
        pairs = dict(zip(("brisk", "nanogpt"), counts, strict=True))
        workers = {}
        for name, side in job.sides().items():
            drawn, rows = pairs[name]
            workers[name] = Worker(side, {**settings, "samples": drawn, "batch_size": rows})
        rounds = take_turns(job, workers)
        rates = {
            name: [pairs[name][0] * tokens / figures["seconds"] for figures in rounds[name]]
            for name in rounds
        }
        what = f"124M, {what}, of {tokens} tokens"
        yield row(what, "tokens/s", rates["brisk"], rates.get("nanogpt"), **job.clocks)


def graphs(job):
    """Ours for one sample and many: under autocast, with weights cast once (as in sample.py), and
    with CUDA graphs, which every call of `generate` captures."""
    settings, tokens = generate_job(job)
    hows = {
        "as it is": {},
        "weights cast once": {"cast": True},
        "weights cast once, CUDA graphs": {"cast": True, "cuda_graph": True},
    }
    side = job.sides()["brisk"]
    for count in (1, job.pick(64, 3)):
        drawn = {"samples": count, "batch_size": count}
        workers = {how: Worker(side, {**settings, **drawn, **more}) for how, more in hows.items()}
        for how, rounds in take_turns(job, workers).items():
            rates = [count * tokens / figures["seconds"] for figures in rounds]
            what = f"124M, samples: {count}, of {tokens} tokens, {how}"
            yield row(what, "tokens/s", rates, **job.clocks)


PARTS = {"samples": samples, "graphs": graphs}
