"""Sampling from GPT-2's size (124M)."""

from gpu_sections.job import GPT2, Worker, row, take_turns
from sides import save_random_model


def samples(job):
    """Tokens a second of `model.generate`: one sample; many, nanoGPT's one after another as its
    sample.py draws them, and as one batch."""
    args, tokens = job.model_args({**GPT2, "vocab_size": 50257}), job.pick(200, 12)
    weights = job.folder / "decode.pt"
    save_random_model(args, weights)
    settings = {"job": "generate", "model_args": args, "weights": str(weights), "tokens": tokens}
    settings["device"] = str(job.device.device)
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


PARTS = {"samples": samples}
