"""Texts drawn at the evaluations of a run, to see what the model has learned so far."""

import torch

from brisk.data.tokenizer import knows_documents
from brisk.errors import UserError

SAMPLE_TOKENS = 100  # of each text


def sample_prompt(config, tokenizer, log):
    """Ids of the prompt for the texts drawn at evaluations, `config.eval_start`; None where none
    are drawn. Raises `UserError` for a prompt with unknown characters."""
    if not config.eval_samples:
        return None
    if tokenizer is None:
        log.say("--eval_samples needs a tokenizer, and the data describes none: no texts are drawn")
        return None
    try:
        ids = tokenizer.encode(config.eval_start, allow_eot=True).tolist()
    except UserError as error:
        raise UserError(f"--eval_start: {error}") from error
    if knows_documents(config.rows, tokenizer):  # what a document begins after
        return [tokenizer.eot, *ids]
    try:
        return ids or tokenizer.encode("\n").tolist()
    except UserError:  # it knows no newline
        return [tokenizer.eot or 0]


def draw_samples(model, tokenizer, prompt, config, device):
    """`config.eval_samples` texts that go on from the ids `prompt`, begun with `config.eval_start`.

    The random numbers are the samples' own, the same ones at every evaluation: training does not
    notice, and the texts differ by what the model has learned.
    """
    stop_ids = [tokenizer.eot] if knows_documents(config.rows, tokenizer) else []
    idx = torch.tensor([prompt] * config.eval_samples, device=device.device)
    choice = {"temperature": 0.8, "top_k": 200, "vocab_size": tokenizer.vocab_size}
    # texts grow, and blocks compiled for training would be compiled anew for their lengths
    with device.autocast(), torch.compiler.set_stance("force_eager"):
        ids = model.generate(idx, SAMPLE_TOKENS, seed=config.seed, stop_ids=stop_ids, **choice)
    texts = []
    for drawn in ids[:, len(prompt) :].tolist():
        end = min((drawn.index(stop) for stop in stop_ids if stop in drawn), default=len(drawn))
        texts.append(config.eval_start + tokenizer.decode(drawn[:end]))
    return texts
