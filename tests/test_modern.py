"""The later model fields: definitions, caching, parameter counts, training and resuming."""

import math
import shutil
from dataclasses import fields
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from networks import MODERN, SIZES, VARIANTS, random_ids, random_model

import bench
import evaluate
import sample
import train
from brisk.checkpoint import load_checkpoint
from brisk.cpu.decode import Decoder
from brisk.device import Device
from brisk.errors import UserError
from brisk.generation.generate import generate
from brisk.generation.kv_cache import KVCache, decode_step, prefill
from brisk.training.memory import expected_memory
from configurator import configure
from model import GPT, GPTConfig, has_grouped_kernel

# ----------------------------------------------------------------------------- the definitions


def qwen3_of(model):
    """transformers' Qwen3 with the weights of a modern `model`."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.hidden_width,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head or c.n_head,
            head_dim=c.n_embd // c.n_head,
            max_position_embeddings=c.block_size,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied,
        )
    ).eval()
    ours = model.state_dict()
    state = {
        "model.embed_tokens.weight": ours["transformer.wte.weight"],
        "model.norm.weight": ours["transformer.ln_f.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    names = {
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "attn.c_proj": "self_attn.o_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "mlp.c_gate": "mlp.gate_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    head_dim, kv_heads = c.n_embd // c.n_head, c.n_kv_head or c.n_head
    rows = [head_dim * heads for heads in (c.n_head, kv_heads, kv_heads)]
    for n in range(c.n_layer):
        for our_name, their_name in names.items():
            weight = ours[f"transformer.h.{n}.{our_name}.weight"]
            state[f"model.layers.{n}.{their_name}.weight"] = weight
        parts = ours[f"transformer.h.{n}.attn.c_attn.weight"].split(rows)
        for part, weight in zip("qkv", parts, strict=True):
            state[f"model.layers.{n}.self_attn.{part}_proj.weight"] = weight
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_head", [0, 2, 1])
@pytest.mark.parametrize("rope_theta", [10000.0, 1e6])
def test_modern_model_matches_qwen3(tied, n_kv_head, rope_theta):
    ours = random_model(**MODERN, tied=tied, n_kv_head=n_kv_head, rope_theta=rope_theta)
    idx = random_ids()
    with torch.no_grad():
        expected = qwen3_of(ours)(idx).logits
    assert expected.std() > 0.5  # they are far from uniform
    assert (ours.predict(idx) - expected).abs().max() < 1e-5


def test_relu2_squares_relu():
    mlp = random_model(mlp="relu2").transformer.h[0].mlp
    x = torch.randn(3, 32)
    hidden = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    expected = hidden.clamp(min=0) ** 2 @ mlp.c_proj.weight.T + mlp.c_proj.bias
    assert torch.allclose(mlp(x), expected, atol=1e-5)


def ngrams_model(**settings):
    """With 3-grams whose embeddings are not zero."""
    return random_model(ngrams=3, **{"ngram_rows": 50, **settings})


def test_each_ngram_has_its_own_embedding():
    """A bigram and a trigram at each position, equal at all positions, and different otherwise."""
    table = ngrams_model(ngram_rows=2**20).transformer.ngrams
    texts = torch.tensor([[5, 6, 7, 8, 5, 6, 7], [0, 6, 7, 0, 6, 0, 6]])
    seen, runs = {}, set()
    for text, rows in zip(texts.tolist(), table.hash_rows(texts).tolist(), strict=True):
        for t in range(7):
            for length, row in zip((2, 3), rows[t], strict=True):
                run = tuple([None] * length + text[: t + 1])[-length:]
                assert seen.setdefault(run, row) == row
                assert (length - 2) * 2**20 <= row < (length - 1) * 2**20
                runs.add(run)
    assert len(set(seen.values())) == len(runs)
    with torch.no_grad():
        expected = table.weight[table.hash_rows(texts)].sum(2) / 2**0.5
        assert torch.allclose(table(texts), expected, atol=1e-6)


def test_ngrams_are_added_to_token_embeddings():
    model, idx = ngrams_model(position="rotary"), random_ids()
    x, _ = model.embed(idx)
    parts = model.transformer
    assert torch.allclose(x, parts.wte(idx) + parts.ngrams(idx), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_ngram_hash_is_uniform(rows):
    """4,225 bigrams of 65 characters and as many trigrams are spread evenly over the rows."""
    table = GPT(GPTConfig(**{**SIZES, "vocab_size": 65}, ngrams=3, ngram_rows=rows)).transformer
    pairs = torch.cartesian_prod(torch.arange(65), torch.arange(65))
    rows_of_pairs = table.ngrams.hash_rows(pairs)[:, 1, 0]
    triples = torch.cat((pairs, pairs[torch.randperm(len(pairs))][:, :1]), dim=1)
    rows_of_triples = table.ngrams.hash_rows(triples)[:, 2, 1] - rows
    for found in (rows_of_pairs, rows_of_triples):
        counts = found.bincount(minlength=rows)
        assert len(counts) == rows and counts.max() <= 4225 / rows + 6 * (4225 / rows) ** 0.5


def test_ngram_dropout():
    table = ngrams_model(ngram_dropout=0.75).transformer.ngrams
    with torch.no_grad():
        table.weight.fill_(2**-0.5)
        assert table(random_ids()).unique().tolist() == pytest.approx([1.0])
        table.train()
        drawn = table(torch.zeros(200, 24, dtype=torch.int64))[..., 0]
    assert {round(value, 3) for value in drawn.unique().tolist()} == {0.0, 2.0, 4.0}
    assert drawn.mean().item() == pytest.approx(1, abs=0.05)


def test_ngrams_on_mps_are_equal(monkeypatch):
    """MPS gets other operations, with the same values and gradients."""
    table, idx = ngrams_model(n_layer=1).transformer.ngrams.train(), random_ids()
    expected = table(idx)
    expected_grad = torch.autograd.grad(expected.square().sum(), table.weight)
    monkeypatch.setattr("model.on_mps", lambda x: True)
    found = table(idx)
    grad = torch.autograd.grad(found.square().sum(), table.weight)
    torch.testing.assert_close((found, grad), (expected, expected_grad))


def test_unseen_ngrams_add_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, ngrams=3, ngram_rows=2**20))
    idx, targets = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 5]])
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.99), "cpu")
    model(idx, targets)[1].backward()
    optimizer.step()
    table = model.transformer.ngrams
    assert (table(idx)[:, 1:].abs() > 0).all()
    assert not table(torch.tensor([[4, 3, 2, 1]]))[:, 1:].any()


class Query:
    """The attributes of queries (B, heads, T, head_dim) that choose a kernel."""

    def __init__(self, dtype=torch.bfloat16, head_dim=64, device="cuda"):
        self.dtype, self.head_dim, self.device = dtype, head_dim, torch.device(device)

    def size(self, dim):
        return self.head_dim


@pytest.mark.parametrize(
    "query, mask, major, grouped",
    [
        (Query(), None, 8, True),
        (Query(torch.float16), None, 9, True),
        (Query(), None, 7, False),  # before Ampere
        (Query(torch.float32), None, 9, False),
        (Query(), torch.zeros(1), 9, False),  # ragged prompts
        (Query(head_dim=320), None, 9, False),
        (Query(torch.float32, device="cpu"), torch.zeros(1), 0, True),
    ],
)
def test_grouped_kernel(monkeypatch, query, mask, major, grouped):
    """Elsewhere PyTorch would compute grouped attention without a fused kernel."""
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert has_grouped_kernel(query, mask) == grouped


@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_expanded_heads_equal_grouped(monkeypatch, n_kv_head):
    """Attention with every key/value head repeated for its group, as where no fused kernel groups
    heads: the same logits and gradients."""
    network, idx = random_model(**MODERN, n_kv_head=n_kv_head), random_ids()
    found = []
    for grouped in (True, False):
        monkeypatch.setattr("model.has_grouped_kernel", lambda *_, grouped=grouped: grouped)
        logits, loss = network(idx, idx)
        found.append((logits, *torch.autograd.grad(loss, list(network.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("field", [{"n_kv_head": 4}, {"rope_theta": 100.0}, {"mlp_width": 128}])
def test_explicit_defaults_change_nothing(field):
    assert random_model(**field).predict(random_ids()).equal(random_model().predict(random_ids()))


def test_rotary_angles_stay_in_float32():
    """Above position 2048, bfloat16 has a spacing of 16; the angles must distinguish them all."""
    model = random_model(**MODERN, block_size=3002, n_layer=1)
    seen = {}

    def keep(block, args):
        seen["angles"] = args[2]

    model.transformer.h[0].register_forward_pre_hook(keep)
    for precision in ("autocast", "weights"):
        if precision == "weights":
            model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
            model.backbone(torch.zeros(1, 3002, dtype=torch.int64))
        cos, sin = (part[-1, 0].double() for part in seen["angles"])
        turned = 3001 / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)
        assert (cos - turned.cos()).abs().max() < 1e-3
        assert (sin - turned.sin()).abs().max() < 1e-3


@pytest.fixture
def every_warning():
    """Make PyTorch repeat its warnings."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bfloat16_is_close_to_float32(variant, every_warning, recwarn):
    model = random_model(**variant)
    expected = model.predict(random_ids())
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(random_ids())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert not recwarn.list  # of norms in mixed precisions, which are slow


# ----------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize("variant", [*VARIANTS, {"bias": True, "gelu": "tanh"}], ids=str)
@pytest.mark.parametrize("decoding", [False, True])
def test_cached_logits_match_uncached(variant, first, decoding):
    """For two rows, one five positions behind the other."""
    model, idx = random_model(**variant), random_ids()
    decoder, cache = Decoder.of(model) if decoding else None, KVCache(model, 2, 24)
    found = []
    prefill(model, [idx[0, : first + 5], idx[1, :first]], cache, [0, 1])
    for i in range(first, 19):
        new = torch.stack((idx[0, i + 5], idx[1, i]))[:, None]
        found.append(decode_step(model, new, cache, decoder=decoder))
    found, expected = torch.stack(found, dim=1), model.predict(idx)
    assert torch.allclose(found[0], expected[0, first + 5 :], atol=1e-5)
    assert torch.allclose(found[1], expected[1, first:19], atol=1e-5)
    heads = variant.get("n_kv_head") or 4
    assert cache.memory[0].shape == (2, 2, heads, 24, 8) and cache.lengths.tolist() == [24, 19]


UNLIKE_PROMPTS = [[7], [3, 1, 4, 1, 5], [*range(23)], [*range(24)], [*range(2, 60)]]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5, "temperature": 0.9}], ids=str)
@pytest.mark.parametrize("exact_window", [False, True])
@pytest.mark.parametrize("variant", [{}, *VARIANTS[:4], VARIANTS[5], *VARIANTS[-2:]], ids=str)
def test_batched_prompts_match_single_prompts(variant, exact_window, options):
    """For 50 tokens with a window of 24."""
    model = random_model(**variant)
    options = {**options, "exact_window": exact_window}
    together = generate(model, UNLIKE_PROMPTS, 50, samples=range(3, 8), **options)
    for number, (ids, found) in enumerate(zip(UNLIKE_PROMPTS, together, strict=True), 3):
        alone = generate(model, torch.tensor([ids]), 50, samples=[number], **options)
        assert found.equal(alone[0]) and len(found) == len(ids) + 50


@pytest.mark.parametrize("variant", [{}, {**MODERN, "n_kv_head": 2}], ids=str)
def test_batched_prompts_match_under_autocast(variant):
    """Without the Decoder. Near ties differ in bfloat16, so logits are compared."""
    model = random_model(**variant)
    expected = [model.predict(torch.tensor([ids[-24:]])) for ids in UNLIKE_PROMPTS]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = KVCache(model, 5, 24)
        prefill(model, [torch.tensor(ids)[-24:-1] for ids in UNLIKE_PROMPTS], cache, [*range(5)])
        last = torch.tensor([ids[-1] for ids in UNLIKE_PROMPTS])[:, None]
        found = decode_step(model, last, cache)
        assert len(generate(model, UNLIKE_PROMPTS, 40)[0]) == 41
    for row, logits in zip(found, expected, strict=True):
        assert (row - logits[0, -1]).abs().max() < 0.05 * logits.abs().max()


def test_rows_stop_independently():
    model, stops = random_model(), {1, 2, 3}
    options = {"temperature": 2.0, "seed": 0}
    free = generate(model, UNLIKE_PROMPTS, 60, **options)
    stopped = generate(model, UNLIKE_PROMPTS, 60, stop_ids=stops, **options)
    ends = set()
    for ids, row, expected in zip(UNLIKE_PROMPTS, stopped, free, strict=True):
        drawn, whole = row[len(ids) :].tolist(), expected[len(ids) :].tolist()
        end = min((i for i, token in enumerate(whole) if token in stops), default=len(whole))
        assert drawn[: end + 1] == whole[: end + 1][: len(drawn)]
        assert set(drawn[end:]) <= {whole[end]} if end < len(whole) else True
        ends.add(end)
    assert len(ends) > 2


def test_decoder_is_float32_only():
    model = random_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert Decoder.of(model) is None
    assert Decoder.of(model.bfloat16()) is None


def test_full_window_rereads_its_newer_half():
    """40 greedy tokens with a window of 24: each is the most likely after the last 13 to 24."""
    model = random_model(**MODERN, n_kv_head=2)
    found = model.generate(random_ids(T=5), 40, temperature=0)
    for T in range(5, 45):
        seen = T if T <= 24 else 13 + (T - 25) % 12
        likeliest = model.predict(found[:, T - seen : T], targets=False)[:, -1].argmax(-1)
        assert found[:, T].equal(likeliest)


# ----------------------------------------------------------------------------- names and numbers


def test_weight_names():
    block = {"ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_proj.weight"}
    block |= {"attn.q_norm.weight", "attn.k_norm.weight"}
    block |= {"mlp.c_fc.weight", "mlp.c_gate.weight", "mlp.c_proj.weight"}
    ends = {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    for tied in (True, False):
        state = random_model(**MODERN, n_layer=1, n_kv_head=1, tied=tied).state_dict()
        assert state.keys() == ends | {f"transformer.h.0.{name}" for name in block}
        assert state["transformer.h.0.attn.c_attn.weight"].shape == ((4 + 1 + 1) * 8, 32)
        same = state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
        assert same == tied


@pytest.mark.parametrize(
    "n_embd, width",  # 8/3: 85.3, 341.3, 682.7, 1024, 2048, 2666.7
    [(32, 88), (128, 344), (256, 704), (384, 1024), (768, 2048), (1000, 2688)],
)
def test_swiglu_width(n_embd, width):
    sizes = dict(n_head=1, n_embd=n_embd, mlp="swiglu")
    assert GPTConfig(**sizes).hidden_width == width
    assert GPTConfig(**sizes, mlp_width=100).hidden_width == 100
    assert 8 * n_embd / 3 <= width < 8 * n_embd / 3 + (64 if n_embd >= 256 else 8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_num_params_and_flops(tied, position):
    further = dict(tied=tied, position=position, n_kv_head=2, mlp="swiglu")
    model = GPT(GPTConfig(**SIZES, **further, ngrams=3, ngram_rows=50))
    C, V, T, W = 32, 61, 24, 88
    products = 3 * (C * C * 2 + C * C + 3 * C * W)  # q, k and v; c_proj; the MLP's three
    vectors = 3 * (2 * C + C + 2 * W + C + 4 * C) + 2 * C  # biases and norms
    without_lookups = products + vectors + V * C
    lookups = T * C * (position == "learned") + V * C * (not tied) + 2 * 50 * C
    assert model.get_num_params(non_embedding=False) == without_lookups + lookups
    assert model.get_num_params() == without_lookups
    assert model.flops_per_token() == 6 * without_lookups + 12 * 3 * C * T


def test_crop_rotary_context():
    model, idx = random_model(**MODERN), random_ids(T=10)
    before = model.predict(idx)
    model.crop_block_size(10)
    assert model.predict(idx).equal(before) and model.config.block_size == 10
    with pytest.raises(ValueError, match="block_size=10"):
        model(random_ids(T=11))


def test_zero_init():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **MODERN, tied=False))
    x = torch.randn(2, 24, 32)
    assert model.transformer.h[0](x).equal(x)
    _, loss = model(random_ids(), random_ids().flip(1))
    assert loss.item() == pytest.approx(math.log(61), abs=1e-6)
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)
    loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0  # it has a gradient
    tied = GPT(GPTConfig(**SIZES, **MODERN))
    assert tied.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"position": "rotory"}, "position=rotory is not one of learned, rotary"),
        ({"norm": "batch"}, "norm=batch is not one of layer, rms"),
        ({"mlp": "relu"}, "mlp=relu is not one of gelu, relu2, swiglu"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"n_kv_head": 8}, "n_head=4 is not divisible by n_kv_head=8"),
        ({"n_embd": 36, "position": "rotary"}, "n_embd / n_head = 9 is odd"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 is not positive"),
        ({"ngrams": 0}, "ngrams=0 is not a whole number of at least 1"),
    ],
    ids=str,
)
def test_incompatible_fields_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SIZES, **wrong})


def test_expected_memory_grows_with_the_model():
    cpu = Device(torch.device("cpu"), "float32")

    def expected(**settings):
        config = GPTConfig(**{**SIZES, **MODERN, **settings})
        return expected_memory(GPT(config), 4, cpu)

    sizes = [expected(n_kv_head=1), expected(), expected(tied=False)]
    assert all(less < more for less, more in pairwise(sizes))


# ----------------------------------------------------------------------------- in the scripts

PRESET = str(ROOT / "config" / "model" / "modern.py")
UNLIKE = {
    "n_kv_head": 1,
    "tied": False,
    "ngrams": 4,
    "ngram_rows": 99,
    "ngram_dropout": 0.5,
    "rope_theta": 500.0,
    "mlp_width": 40,
}


@pytest.mark.parametrize("Config", [train.TrainConfig, bench.BenchConfig])
def test_scripts_inherit_the_model_fields(Config):
    defaults = {field.name: field.default for field in fields(GPTConfig)}
    script = Config()
    assert not script.bias  # GPT-2 has biases, nanoGPT's script trains without
    for key in defaults.keys() - {"bias", "vocab_size"}:
        assert getattr(script, key) == defaults[key]


def test_preset_is_the_modern_model():
    config = configure(train.TrainConfig, [PRESET])
    assert {key: getattr(config, key) for key in MODERN} == MODERN
    assert set(config.given) == MODERN.keys()


@pytest.mark.parametrize("changes", [{}, UNLIKE], ids=str)
def test_modern_run_resumes_and_samples(
    changes, main, settings, resume, tmp_path, char_data, capsys
):
    whole = main([PRESET, *settings(tmp_path / "whole", max_iters=4, dropout=0.1, **changes)])
    main([PRESET, *settings(tmp_path / "parts", max_iters=2, dropout=0.1, **changes)])
    parts = resume(tmp_path / "parts", max_iters=4)
    assert ("number of n-gram parameters: 0.0" in parts.console) == ("ngrams" in changes)
    expected, found = whole.checkpoint(), parts.checkpoint()
    assert found["iter_num"] == 5 and found["model_args"] == expected["model_args"]
    for name, weight in expected["model"].items():
        assert found["model"][name].equal(weight)

    defaults = {field.name: field.default for field in fields(GPTConfig)}
    further = {**MODERN, **changes}
    assert all(found["model_args"][key] == value for key, value in further.items())
    assert all(found["model_args"][k] != defaults[k] for k in [*found["model_args"]][7:])
    untied = not found["model"]["lm_head.weight"].equal(found["model"]["transformer.wte.weight"])
    assert untied == ("tied" in changes)

    model = GPT.from_checkpoint(tmp_path / "parts" / "last.pt")
    assert model.config == GPTConfig(**found["model_args"])
    common = [f"--out_dir={tmp_path / 'parts'}", "--device=cpu", "--dtype=float32"]
    argv = [*common, "--num_samples=1", "--max_new_tokens=40", "--start=Shall"]
    capsys.readouterr()
    sample.main(configure(sample.SampleConfig, argv))
    assert len(capsys.readouterr().out) > 40
    evaluate.main(configure(evaluate.EvaluateConfig, [*common, f"--data_dir={char_data}"]))
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_modern_model_compiles(main, settings, tmp_path):
    def losses(compiling):
        given = settings(tmp_path / str(compiling), max_iters=3, n_kv_head=1, compile=compiling)
        return main([PRESET, *given]).series("loss")

    assert losses(True) == pytest.approx(losses(False), abs=1e-4)


def test_modern_run_on_two_ranks_matches_one(main, settings, torchrun, tmp_path):
    # not from zeros: AdamW would amplify gradients that are only rounding error
    given = dict(max_iters=2, n_kv_head=1, tied=False, zero_init=False)
    one = main([PRESET, *settings(tmp_path / "one", **given)])
    result = torchrun("train.py", PRESET, *settings(tmp_path / "two", **given), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    two = load_checkpoint(tmp_path / "two" / "last.pt")["model"]
    for name, weight in one.checkpoint()["model"].items():
        assert torch.allclose(two[name], weight, atol=1e-5)


def test_resume_keeps_the_model_of_the_checkpoint(train_tiny, resume, tmp_path):
    train_tiny(tmp_path / "modern", max_iters=0, position="rotary", n_kv_head=1)
    run = resume(tmp_path / "modern", max_iters=1, n_kv_head=2, norm="rms")
    assert "the checkpoint's n_kv_head=1, norm=layer stays" in run.console
    train_tiny(tmp_path / "classic", max_iters=0)
    run = resume(tmp_path / "classic", max_iters=1, mlp="swiglu")
    assert "the checkpoint's mlp=gelu stays" in run.console
    assert len(run.checkpoint()["model_args"]) == 7


def test_incompatible_keys_are_one_line(train_tiny, tmp_path):
    with pytest.raises(UserError, match="n_head=2 is not divisible by n_kv_head=3"):
        train_tiny(tmp_path / "out", n_kv_head=3)
    with pytest.raises(UserError, match="n_embd / n_head = 5 is odd"):
        train_tiny(tmp_path / "out", n_embd=10, position="rotary")
    with pytest.raises(UserError, match="position takes learned or rotary"):
        train_tiny(tmp_path / "out", position="absolute")
