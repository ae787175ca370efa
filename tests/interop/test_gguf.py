"""A GGUF file read back: tensors, sizes and tokenizer are the model's."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_export import CHARACTERS, MODELS, TEXTS, make_model, make_tokenizer, run_export

from brisk.data.bpe import byte_alphabet
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError

gguf = pytest.importorskip("gguf")

# What llama.cpp names the weights of a block, and ours. (Its src/llama-arch.cpp.)
GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
QWEN3_BLOCK = {
    "attn_norm": "ln_1",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_gate": "mlp.c_gate",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@pytest.fixture
def read_back(tmp_path):
    """`read_back(model, tokenizer)`: (values of keys, tensors) of the file export.py makes."""

    def read_back(model, tokenizer):
        run_export(tmp_path / "out", model, tokenizer, gguf=tmp_path / "model.gguf")
        reader = gguf.GGUFReader(tmp_path / "model.gguf")
        assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
        tensors = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
        return {key: field.contents() for key, field in reader.fields.items()}, tensors

    return read_back


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_sizes_are_the_models(read_back, name):
    model = make_model(ByteTokenizer(), **MODELS[name])
    values, tensors = read_back(model, ByteTokenizer())
    state, config = model.state_dict(), model.config
    modern = config.position == "rotary"
    expected = {"token_embd.weight": state["transformer.wte.weight"][:257]}
    if not config.tied:
        expected["output.weight"] = state["lm_head.weight"][:257]
    names = {"output_norm": "ln_f"}
    for i in range(config.n_layer):
        block = QWEN3_BLOCK if modern else GPT2_BLOCK
        names |= {f"blk.{i}.{theirs}": f"h.{i}.{ours}" for theirs, ours in block.items()}
        if modern:
            c_attn = state[f"transformer.h.{i}.attn.c_attn.weight"]
            parts = c_attn.split([32, 8 * config.kv_heads, 8 * config.kv_heads])
            expected |= {f"blk.{i}.attn_{x}.weight": w for x, w in zip("qkv", parts, strict=True)}
    for theirs, ours in names.items():
        weight = expected[f"{theirs}.weight"] = state[f"transformer.{ours}.weight"]
        if not modern:
            no_bias = torch.zeros(len(weight))
            expected[f"{theirs}.bias"] = state.get(f"transformer.{ours}.bias", no_bias)
    if not modern:
        expected["position_embd.weight"] = state["transformer.wpe.weight"]
    assert tensors.keys() == expected.keys()
    for tensor_name, tensor in tensors.items():
        assert tensor.equal(expected[tensor_name]), tensor_name

    arch = "qwen3" if modern else "gpt2"
    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": config.hidden_width,
        "attention.head_count": 4,
    }
    if modern:
        sizes |= {"attention.head_count_kv": config.kv_heads, "rope.freq_base": config.rope_theta}
        sizes |= {"attention.key_length": 8, "attention.value_length": 8}
        sizes["attention.layer_norm_rms_epsilon"] = pytest.approx(1e-6)
    else:
        sizes["attention.layer_norm_epsilon"] = pytest.approx(1e-5)
    assert values["general.architecture"] == arch
    found = {key.removeprefix(f"{arch}."): v for key, v in values.items() if key.startswith(arch)}
    assert found == sizes


def merged(text, values):
    """The ids that llama.cpp gives a piece of text: the most urgent pair is merged, again and
    again (its llm_tokenizer_bpe_session, without the cutting into words)."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    parts = [letters[byte] for byte in text.encode()]
    urgency = {pair: i for i, pair in enumerate(values["tokenizer.ggml.merges"])}
    while True:
        pairs = [f"{a} {b}" for a, b in pairwise(parts)]
        found = [(urgency[pair], i) for i, pair in enumerate(pairs) if pair in urgency]
        if not found:
            return [values["tokenizer.ggml.tokens"].index(part) for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_tokenizer_is_inside(read_back, kind):
    tokenizer = make_tokenizer(kind)
    values, _ = read_back(make_model(tokenizer), tokenizer)
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == tokenizer.vocab_size
    assert tokens[tokenizer.eot] == EOT
    types = values["tokenizer.ggml.token_type"]
    assert types.pop(tokenizer.eot) == gguf.TokenType.CONTROL
    assert set(types) == {gguf.TokenType.NORMAL}
    for key in ("eos", "bos"):
        assert values[f"tokenizer.ggml.{key}_token_id"] == tokenizer.eot
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert len(values["tokenizer.ggml.merges"]) >= 1  # llama.cpp loads no file without
    for word in " ".join(TEXTS.values()).replace(EOT, "").split():
        if kind != "bpe" or word.isalpha():  # which GPT-2's pattern leaves whole
            assert merged(word, values) == tokenizer.encode(word).tolist()


def test_what_cannot_be_carried_is_refused(tmp_path):
    for tokenizer, words in {
        CharTokenizer(CHARACTERS): "id 11 for the end of text",
        WordTokenizer(["a", "b"], eot=True): "word tokenizer",
    }.items():
        with pytest.raises(UserError, match=words):
            run_export(tmp_path, make_model(tokenizer), tokenizer, gguf=tmp_path / "model.gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_only_an_earlier_export_is_replaced(tmp_path):
    tokenizer = ByteTokenizer()
    path = tmp_path / "model.gguf"

    def to(model, **settings):
        run_export(tmp_path / "out", model, tokenizer, gguf=path, **settings)

    for text in (b"", b"GGUF", b"my thesis"):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"model\.gguf is there and is no export"):
            to(make_model(tokenizer), overwrite=True)
        assert path.read_bytes() == text
    path.unlink()
    to(make_model(tokenizer))
    with pytest.raises(UserError, match="earlier export; --overwrite"):
        to(make_model(tokenizer))
    before = path.read_bytes()
    to(make_model(tokenizer, n_layer=1), overwrite=True)
    assert len(path.read_bytes()) < len(before)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        run_export(tmp_path, make_model(ByteTokenizer()), ByteTokenizer(), gguf=tmp_path / "a")
