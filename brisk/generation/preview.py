"""Samples of the model at the evaluations of a run."""

import torch

from brisk.data.tokenizer import knows_documents
from brisk.errors import UserError

SAMPLE_TOKENS = 100  # in each sample


def sample_prompt(config, tokenizer, log):
    """Ids of the prompt `config.eval_start`, or None if no samples are requested. Raises
    `UserError` for a prompt with unknown characters."""
    if not config.eval_samples:
        return None
    if tokenizer is None:
        log.say("--eval_samples needs a tokenizer, but the data has none: no samples")
        return None
    try:
        ids = tokenizer.encode(config.eval_start, allow_eot=True).tolist()
    except UserError as error:
        raise UserError(f"--eval_start: {error}") from error
    if knows_documents(config.rows, tokenizer):  # documents begin after an end-of-text token
        return [tokenizer.eot, *ids]
    try:
        return ids or tokenizer.encode("\n").tolist()
    except UserError:  # no newline in the vocabulary
        return [tokenizer.eot or 0]


def draw_samples(model, tokenizer, prompt, config, device):
    """Sample `config.eval_samples` texts that continue the ids `prompt`.

    They use their own generator with the same seed at every evaluation: training is not affected,
    and differences between texts are due to the model.
    """
    stop_ids = [tokenizer.eot] if knows_documents(config.rows, tokenizer) else []
    idx = torch.tensor([prompt] * config.eval_samples, device=device.device)
    options = {"temperature": 0.8, "top_k": 200, "vocab_size": tokenizer.vocab_size}
    # eager: compiled blocks would be compiled again for the lengths of the samples
    with device.autocast(), torch.compiler.set_stance("force_eager"):
        ids = model.generate(idx, SAMPLE_TOKENS, seed=config.seed, stop_ids=stop_ids, **options)
    texts = []
    for new_ids in ids[:, len(prompt) :].tolist():
        end = min((new_ids.index(i) for i in stop_ids if i in new_ids), default=len(new_ids))
        texts.append(config.eval_start + tokenizer.decode(new_ids[:end]))
    return texts
