"""GGUF files: tensors, sizes and tokenizer match the model."""

import codecs
import sys
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TEXT
from test_export import (
    CHARACTERS,
    MODELS,
    MODERN,
    SIZES,
    TEXTS,
    make_model,
    make_tokenizer,
    run_export,
)

from brisk.data.bpe import byte_alphabet, train_bpe
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError
from model import GPT, GPTConfig

gguf = pytest.importorskip("gguf")

# llama.cpp's names of the weights in a block (src/llama-arch.cpp), and ours.
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
    """`read_back(model, tokenizer)`: export to a file. Returns its (values of keys, tensors)."""

    def read_back(model, tokenizer):
        run_export(tmp_path / "out", model, tokenizer, gguf=tmp_path / "model.gguf")
        reader = gguf.GGUFReader(tmp_path / "model.gguf")
        assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
        tensors = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
        return {key: field.contents() for key, field in reader.fields.items()}, tensors

    return read_back


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_sizes_match_the_model(read_back, name):
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
    """llama.cpp's ids of a piece of text: repeatedly merge the pair of the highest priority
    (llm_tokenizer_bpe_session, without the split into words)."""
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
def test_tokenizer_is_included(read_back, kind):
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
    assert len(values["tokenizer.ggml.merges"]) >= 1  # llama.cpp requires one
    for word in " ".join(TEXTS.values()).replace(EOT, "").split():
        if kind != "bpe" or word.isalpha():  # GPT-2's pattern does not split it
            assert merged(word, values) == tokenizer.encode(word).tolist()


def test_characters_without_an_end_of_text(read_back):
    """As an RWKV vocabulary: llama.cpp's byte-pair encoding requires an end-of-text."""
    tokenizer = CharTokenizer(CHARACTERS)
    values, _ = read_back(make_model(tokenizer), tokenizer)
    tokens = [codecs.escape_decode(token)[0].decode() for token in values["tokenizer.ggml.tokens"]]
    assert tokens == CHARACTERS
    assert values["tokenizer.ggml.model"] == "rwkv"
    assert not [key for key in values if key.endswith("token_id")]


@pytest.mark.parametrize("name", ["classic", "wide", "shared keys"])
@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_smaller_types_are_close(tmp_path, dtype, name):
    tokenizer = ByteTokenizer()
    model = make_model(tokenizer, **MODELS[name])
    tensors = {}
    for kind in ("float32", dtype):
        path = tmp_path / f"{kind}.gguf"
        run_export(tmp_path / "out", model, tokenizer, gguf=path, gguf_dtype=kind)
        tensors[kind] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    file_type = gguf.GGUFReader(path).fields["general.file_type"].contents()
    assert file_type == gguf.LlamaFileType[{"float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[dtype]]
    types = set()
    for key, exact in tensors["float32"].items():
        found = tensors[dtype][key]
        kind, exact = found.tensor_type.name, np.array(exact.data)
        value = gguf.quants.dequantize(np.array(found.data), found.tensor_type)
        assert value.shape == exact.shape
        if exact.ndim == 1 or key.startswith("position"):
            assert kind == "F32" and (value == exact).all()
        else:
            types.add(kind)
            divisible = dtype == "q8_0" and exact.shape[1] % 32 == 0
            assert kind == ("Q8_0" if divisible else "F16")
            # half a quantization step: 1/127 of the largest of 32, with a float16 scale; or float16
            largest = np.abs(exact.reshape(-1, 32) if divisible else exact).max()
            assert np.abs(value - exact).max() <= largest * (0.51 / 127 if divisible else 2**-11)
    uneven = {"wide", "shared keys"} if dtype == "q8_0" else ()
    assert types == {{"float16": "F16", "q8_0": "Q8_0"}[dtype]} | (
        {"F16"} if name in uneven else set()
    )


def test_unsupported_model_is_refused(tmp_path):
    """Then neither the file nor the directory is written."""
    known, words = ByteTokenizer(), WordTokenizer(["a", "b"], eot=True)
    large = make_model(known)
    with torch.no_grad():
        large.transformer.h[1].mlp.c_fc.weight[0, 0] = 1e5
    for model, tokenizer, message, dtype in [
        (make_model(words), words, "word tokenizer", "float32"),
        (large, known, "h.1.mlp.c_fc.weight overflows float16", "q8_0"),
    ]:
        paths = dict(to=tmp_path / "new" / "to", gguf=tmp_path / "newer" / "model.gguf")
        with pytest.raises(UserError, match=message):
            run_export(tmp_path, model, tokenizer, gguf_dtype=dtype, **paths)
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    with pytest.raises(UserError, match="both name"):
        run_export(tmp_path, large, known, to=tmp_path / "a", gguf=tmp_path / "b" / ".." / "a")


def test_only_an_earlier_export_is_replaced(tmp_path):
    tokenizer = ByteTokenizer()
    path = tmp_path / "model.gguf"

    def to(model, **settings):
        run_export(tmp_path / "out", model, tokenizer, gguf=path, **settings)

    for text in (b"", b"GGUF", b"my thesis"):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"model\.gguf exists and is not an unchanged export"):
            to(make_model(tokenizer), overwrite=True)
        assert path.read_bytes() == text
    path.unlink()
    to(make_model(tokenizer))
    with pytest.raises(UserError, match="earlier export; replace it with --overwrite"):
        to(make_model(tokenizer))
    before = path.read_bytes()
    to(make_model(tokenizer, n_layer=1), overwrite=True)
    assert len(path.read_bytes()) < len(before)


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        paths = dict(to=tmp_path / "to", gguf=tmp_path / "a")
        run_export(tmp_path, make_model(ByteTokenizer()), ByteTokenizer(), **paths)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@cache
def trained(network, kind):
    """(model, tokenizer): a small model that has nearly memorized two sonnets."""
    torch.manual_seed(0)
    tokenizer = {
        "bpe": lambda: train_bpe([TEXT], 400),
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer(sorted(set(TEXT)), eot=True),
        "char without end": lambda: CharTokenizer(sorted(set(TEXT))),
    }[kind]()
    fields = MODERN if network == "modern" else dict(gelu="tanh")
    sizes = {**SIZES, "n_embd": 64, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**{**sizes, **fields}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = torch.tensor(tokenizer.encode(TEXT).tolist()).unfold(0, 65, 1)
    for _ in range(150):
        batch = windows[torch.randint(len(windows), (8,))]
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        optimizer.step(), optimizer.zero_grad()
    return model.eval(), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "char without end"])
@pytest.mark.parametrize("network", ["classic", "modern"])
def test_llama_cpp_generates_the_same_text(tmp_path, network, kind, dtype):
    reason = "needs llama.cpp's library: pip install xllamacpp"
    xllamacpp = pytest.importorskip("xllamacpp", reason=reason)
    model, tokenizer = trained(network, kind)
    run_export(tmp_path, model, tokenizer, gguf=tmp_path / "model.gguf", gguf_dtype=dtype)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(tmp_path / "model.gguf"), 64, 1
    params.cpuparams.n_threads, params.n_gpu_layers, params.warmup = 1, 0, False
    server, equal = xllamacpp.Server(params), []
    for prompt in ("Shall I compare", "Let me not to", "And summer's"):
        asked = {"prompt": prompt, "max_tokens": 30, "temperature": 0}
        theirs = server.handle_completions(asked)["choices"][0]["text"]
        idx = torch.tensor([tokenizer.encode(prompt).tolist()])
        ids = model.generate(idx, 30, temperature=0, vocab_size=tokenizer.vocab_size)
        equal.append(theirs == tokenizer.decode(ids[0, idx.size(1) :]))
    assert all(equal) if dtype != "q8_0" else any(equal)
