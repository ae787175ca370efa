"""The CPU decode kernel computes the network, for every field of its config."""

from dataclasses import fields

import pytest
import torch
from networks import MODERN, SIZES, random_ids, random_model

from brisk.cpu.decode import Decoder
from brisk.generation.kv_cache import KVCache, decode_step, prefill
from model import GPTConfig

# Other values of each field, with the fields that they need.
OTHERS = {
    "block_size": [{"block_size": 31}],
    "vocab_size": [{"vocab_size": 70}],
    "n_layer": [{"n_layer": 1}],
    "n_head": [{"n_head": 2}, {"n_head": 8}],
    "n_embd": [{"n_embd": 40}],
    "dropout": [{"dropout": 0.5}],
    "bias": [{"bias": False}],
    "gelu": [{"gelu": "tanh"}],
    "n_kv_head": [{"n_kv_head": 1}, {"n_kv_head": 2}],
    "position": [{"position": "rotary"}],
    "rope_theta": [{"position": "rotary", "rope_theta": 50.0}],
    "norm": [{"norm": "rms"}],
    "qk_norm": [{"qk_norm": True}, {"qk_norm": True, "n_kv_head": 1, "position": "rotary"}],
    "mlp": [{"mlp": "relu2"}, {"mlp": "swiglu"}, {"mlp": "swiglu", "bias": False}],
    "mlp_width": [{"mlp_width": 24}, {"mlp": "swiglu", "mlp_width": 24}],
    "tied": [{"tied": False}],
    "zero_init": [{"zero_init": True}],
    "ngrams": [{"ngrams": 2, "ngram_rows": 50}, {"ngrams": 5, "ngram_rows": 50}],
    "ngram_rows": [{"ngrams": 3, "ngram_rows": 7}],
    "ngram_dropout": [{"ngrams": 3, "ngram_rows": 50, "ngram_dropout": 0.5}],
}


def test_variants_cover_every_config_field():
    assert OTHERS.keys() == {field.name for field in fields(GPTConfig)}
    for name, others in OTHERS.items():
        usual = getattr(GPTConfig(**SIZES), name)
        assert all(other[name] != usual for other in others)


@pytest.mark.parametrize("base", [{}, {**MODERN, "n_kv_head": 2}], ids=["gpt2", "modern"])
@pytest.mark.parametrize("field", OTHERS)
def test_decoder_matches_the_network(field, base):
    """At equal and at different positions, up to the last."""
    for other in OTHERS[field]:
        model, idx = random_model(**{**base, **other}), random_ids()
        decoder, cache = Decoder.of(model), KVCache(model, 2, 24)
        expected = model.predict(idx)
        for i in range(12):
            found = decode_step(model, idx[:, i : i + 1], cache, decoder=decoder)
            torch.testing.assert_close(found, expected[:, i], rtol=0, atol=1e-5)
        prefill(model, [idx[0, 12:20]], cache, [0])
        for i in range(12, 16):
            ids = torch.stack((idx[0, i + 8], idx[1, i]))[:, None]
            found = decode_step(model, ids, cache, decoder=decoder)
            wanted = torch.stack((expected[0, i + 8], expected[1, i]))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
