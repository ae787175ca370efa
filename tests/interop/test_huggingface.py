"""Import of GPT-2 and Qwen3: the same logits as transformers, or one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from brisk.errors import UserError
from brisk.interop import gpt2, qwen3
from brisk.interop.huggingface import GPT2_NAMES, load_pretrained
from brisk.interop.pretrained import read_pretrained
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SIZES = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=48)


def random_gpt2(**settings):
    """A small GPT2LMHeadModel with all parameters random, including biases and norms."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, **settings)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


def random_qwen3(**settings):
    """A small Qwen3ForCausalLM with random weights."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    sizes |= dict(num_key_value_heads=2, intermediate_size=40, vocab_size=100)
    config = transformers.Qwen3Config(**{**sizes, "max_position_embeddings": 48, **settings})
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


def assert_same_logits(theirs, directory):
    ours = GPT.from_pretrained(str(directory)).eval()
    idx = torch.randint(100, (3, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours.predict(idx) - theirs(idx).logits).abs().max()
    assert difference <= 1e-4
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == theirs.config.tie_word_embeddings


def test_missing_tokenizer_is_refused(tmp_path):
    """A vocabulary of another size than GPT-2's is another tokenizer's."""
    random_qwen3().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        read_pretrained(str(tmp_path), "out")


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["whole", "sharded"])
def test_gpt2_logits_match_transformers(tmp_path, activation, options):
    theirs = random_gpt2(activation_function=activation)
    theirs.save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_qwen3_logits_match_transformers(tmp_path, tied, options):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    theirs = random_qwen3(tie_word_embeddings=tied, rope_parameters=rope)
    theirs.save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    assert_same_logits(theirs, tmp_path)


def test_config_before_transformers_5(tmp_path):
    theirs = random_qwen3(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 1e6
    config |= {"rope_theta": 1e6, "rope_scaling": None}
    del config["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_dim", 16),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-5),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_unsupported_qwen3_key_is_named(tmp_path, key, value):
    config = {**random_qwen3().config.to_dict(), key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=key):
        load_pretrained(tmp_path)


def test_unsupported_qwen3_is_refused(tmp_path):
    theirs = random_qwen3()
    theirs.save_pretrained(tmp_path)
    right = json.loads((tmp_path / "config.json").read_text())

    def error_after(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**right, **changes}))
        with pytest.raises(UserError) as caught:
            load_pretrained(tmp_path)
        return str(caught.value)

    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    assert "rope_type=yarn" in error_after(rope_parameters=yarn)
    older = {"type": "linear", "factor": 4.0}
    assert "rope_type=linear" in error_after(rope_parameters=None, rope_scaling=older)
    assert "each of 3 layers" in error_after(num_hidden_layers=3)
    del right["layer_types"]
    assert "has no transformer.h.2." in error_after(num_hidden_layers=3)
    assert "unknown to Qwen3: model.layers.1." in error_after(num_hidden_layers=1)
    assert "k_proj.weight is (16, 32)" in error_after(num_key_value_heads=1)
    del right["hidden_size"]
    assert "has no hidden_size" in error_after()


@pytest.mark.parametrize(
    "make, changes",
    [
        (random_gpt2, {"tie_word_embeddings": [1, "2"]}),
        (random_gpt2, {"n_head": 3}),
        (random_qwen3, {"tie_word_embeddings": 2}),
        (random_qwen3, {"num_key_value_heads": "x"}),
        (random_qwen3, {"num_key_value_heads": [2]}),
        (random_qwen3, {"num_key_value_heads": 3}),
        (random_qwen3, {"rope_parameters": {"rope_theta": "x"}}),
        (random_qwen3, {"rope_parameters": {"rope_theta": 10**400}}),
    ],
)
def test_invalid_config_is_refused(tmp_path, make, changes, train_tiny):
    """In one line, by the model and by a run that starts from the directory."""
    make().save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(UserError):
        train_tiny(tmp_path / "out", init_from=tmp_path)


def test_scaled_rope_is_refused(tmp_path):
    """If a config has both the old and the new entry, transformers uses only the old one."""
    theirs = random_qwen3(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    theirs.save_pretrained(tmp_path)
    right = json.loads((tmp_path / "config.json").read_text())
    for words, changes in {
        "rope_type=yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "full_attention in rope_parameters": {"rope_parameters": {"full_attention": {}}},
        "factor in rope_scaling": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({**right, **changes}))
        with pytest.raises(UserError, match=words):
            load_pretrained(tmp_path)
    again = {**right, "rope_parameters": None, "rope_scaling": right["rope_parameters"]}
    (tmp_path / "config.json").write_text(json.dumps(again))
    assert_same_logits(theirs, tmp_path)


def test_key_and_value_shapes_are_checked(tmp_path):
    """Queries, keys and values with the right total size, but wrong separate sizes."""
    random_qwen3().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.{}_proj.weight"
    keys = torch.cat([weights[name.format("k")], weights[name.format("v")]])
    rows = {"k": keys[:8], "v": keys[8:]}
    save_file(weights | {name.format(x): w.clone() for x, w in rows.items()}, tmp_path / "a")
    (tmp_path / "a").replace(tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"k_proj.weight is \(8, 32\), but its config implies \(16, 32\)"
    ):
        load_pretrained(tmp_path)


def test_qwen3_finetunes_from_its_directory(tmp_path, train_tiny):
    random_qwen3().save_pretrained(tmp_path / "qwen3")
    run = train_tiny(tmp_path / "out", init_from=tmp_path / "qwen3", max_iters=3)
    args = run.checkpoint()["model_args"]
    assert (args["position"], args["n_kv_head"], args["mlp_width"]) == ("rotary", 2, 40)
    losses = run.series("val_loss")
    assert losses[4] < losses[0]


def test_old_hub_files(tmp_path):
    """Without prefix and head, with mask buffers, float16 in a pickle, and a short config."""
    theirs = random_gpt2().half().float()
    weights = {name: weight.half() for name, weight in theirs.transformer.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    assert_same_logits(theirs, tmp_path)


def test_load_pretrained(tmp_path):
    random_gpt2().bfloat16().save_pretrained(tmp_path)
    config_args, state = load_pretrained(tmp_path)
    assert config_args == dict(
        block_size=48,
        vocab_size=100,
        n_layer=2,
        n_head=2,
        n_embd=32,
        bias=True,
        gelu="tanh",
        mlp_width=0,
        tied=True,
    )
    assert all(w.dtype == torch.float32 and w.is_contiguous() for w in state.values())
    assert state["lm_head.weight"].equal(state["transformer.wte.weight"])
    model = GPT.from_pretrained(tmp_path, {"dropout": 0.3})
    assert model.config.dropout == 0.3 and model.transformer.h[0].mlp.dropout.p == 0.3


def test_weight_shapes_match_the_model():
    sizes = dict(n_layer=2, n_embd=32, vocab_size=100, block_size=48, n_head=2, mlp_width=40)
    for family, args in ((gpt2, {}), (qwen3, {**qwen3.FIELDS, "n_kv_head": 1})):
        model = GPT(GPTConfig(**sizes, **args))
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        assert family.weight_shapes(**sizes, **args) == shapes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_unsupported_gpt2_key_is_named(tmp_path, key, value):
    config = {"model_type": "gpt2", **SIZES, key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{key}={value}"):
        load_pretrained(tmp_path)


def test_weights_not_matching_config_are_refused(tmp_path):
    random_gpt2().save_pretrained(tmp_path)

    def error_after(**changes):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "gpt2", **SIZES, **changes})
        )
        with pytest.raises(UserError) as caught:
            load_pretrained(tmp_path)
        return str(caught.value)

    assert "has no transformer.h.2." in error_after(n_layer=3)
    assert "unknown to GPT-2: transformer.h.1." in error_after(n_layer=1)
    assert "transformer.wte.weight is (100, 32)" in error_after(vocab_size=101)


def write_bin_shards(folder, weights):
    """Sharded PyTorch files, as written by transformers before version 5."""
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2]}
    shards["pytorch_model-00002-of-00002.bin"] = names[1::2]
    for shard, held in shards.items():
        torch.save({name: weights[name].clone() for name in held}, folder / shard)
    index = {
        "metadata": {},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("make", [random_gpt2, random_qwen3])
def test_pytorch_files_in_shards(tmp_path, make):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {k: w for k, w in theirs.state_dict().items() if k != "lm_head.weight"}
    write_bin_shards(
        tmp_path, weights if theirs.config.tie_word_embeddings else theirs.state_dict()
    )
    assert_same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)
    assert_same_logits(theirs, tmp_path)


def test_file_priority_matches_transformers(tmp_path):
    """Each kind of file has other weights. Remove the one that is loaded, and load again."""
    first = random_gpt2()
    for scale, options in ((2, {"max_shard_size": "40KB"}), (1, {})):
        changed = {k: w * scale for k, w in first.state_dict().items()}
        first.save_pretrained(tmp_path / str(scale), state_dict=changed, **options)
    for folder in ("2", "1"):
        for path in (tmp_path / folder).iterdir():
            path.replace(tmp_path / path.name)
    weights = {k: w for k, w in first.state_dict().items() if k != "lm_head.weight"}
    torch.save({k: w * 3 for k, w in weights.items()}, tmp_path / "pytorch_model.bin")
    write_bin_shards(tmp_path, {k: w * 4 for k, w in weights.items()})
    name = "transformer.h.0.mlp.c_fc.bias"
    order = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    for scale, file in enumerate([*order, "pytorch_model.bin.index.json"], start=1):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert theirs.state_dict()[name].equal(weights[name] * scale)
        assert load_pretrained(tmp_path)[1][name].equal(weights[name] * scale)
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match="neither"):
        load_pretrained(tmp_path)


def test_differing_tied_head_is_refused(tmp_path):
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path)
    weights = {**theirs.state_dict(), "lm_head.weight": torch.zeros(100, 32)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="but they differ"):
        load_pretrained(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_pretrained(tmp_path)


def test_names(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean gpt2-xl"):
        load_pretrained("gpt2-xxl")
    import huggingface_hub

    asked = []

    def no_network(name, file, **options):
        asked.append((name, options))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    for name in GPT2_NAMES:
        with pytest.raises(UserError, match=f"of {name}; .*directory"):
            load_pretrained(name)
    assert asked[:2] == [("gpt2", {"local_files_only": True}), ("gpt2", {})]  # the cache first


def test_hub_cache_works_offline(tmp_path, monkeypatch):
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path)
    import huggingface_hub

    def cached(name, file, local_files_only=False):
        assert name == "gpt2-large" and local_files_only
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert_same_logits(theirs, "gpt2-large")
