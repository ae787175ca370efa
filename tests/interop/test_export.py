"""export.py: other programs compute the same, and no foreign files are replaced."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import export
import sample
from brisk.checkpoint import save_checkpoint
from brisk.data.bpe import train_bpe
from brisk.data.dataset import write_dataset
from brisk.data.saved_tokenizer import from_dict
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError
from brisk.interop.tokenizer_json import last_merge, read_tokenizer, to_tokenizers, tokenizer_files
from configurator import configure
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

CODE = 'def f(x):\n\treturn x["a"] ** 2  # über\n\n\n    if x:\r\n        pass\n'
TEXTS = {
    "english": "It's the year 2024, isn't it? They'll SAY so; we've 12,345 reasons.",
    "chinese": "语言模型读了很多书，写得不好也不坏。差评：一九八四",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301 ﷽ 𝔘𝔫𝔦 \ufeff",
    "white space": " a  b   c\t\td \n\n \n  e \u00a0\u2003\u3000f\u0085g\u200b   ",
    "line ends": "one\r\ntwo\r\n\r\nthree\rfour\n\r",
    "code": CODE,
    "empty": "",
    "space": " ",
    "special": f"{EOT}a{EOT}{EOT} <|endoftext| ><s></s>[UNK]<unk><pad> <|im_start|>",
    "control": "\x00\x01\x1b[0m\x7f\x80\x9f",
}
CHARACTERS = sorted(set("".join(TEXTS.values())))
SIZES = dict(block_size=64, n_layer=2, n_head=4, n_embd=32)
MODELS = {
    "classic": dict(gelu="none"),
    "GPT-2's GELU": dict(gelu="tanh"),
    "without biases": dict(bias=False, gelu="none"),
    "wide": dict(mlp_width=72, tied=False),
}
MODERN = dict(position="rotary", norm="rms", qk_norm=True, mlp="swiglu", bias=False)
MODELS |= {
    "modern": MODERN,
    "shared keys": dict(**MODERN, n_kv_head=2, rope_theta=500.0, mlp_width=40),
    "untied": dict(**MODERN, n_kv_head=1, tied=False),
}


def make_tokenizer(kind):
    return {
        "char": lambda: CharTokenizer(CHARACTERS, eot=True),
        "char without end": lambda: CharTokenizer(CHARACTERS),
        "byte": ByteTokenizer,
        "bpe": lambda: train_bpe(list(TEXTS.values()) * 2, 300),
    }[kind]()


@pytest.fixture(scope="module", params=["char", "char without end", "byte", "bpe", "gpt2"])
def tokenizer(request):
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2_tokenizer")
    return make_tokenizer(request.param)


def make_model(tokenizer, rows=5, **fields):
    """A small model with random weights and `rows` of vocabulary padding."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + rows, **{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.lm_head.weight[tokenizer.vocab_size :] += 1  # padding ids are likely
    return model


def run_export(folder, model, tokenizer, rows="windows", **settings):
    """Run export.py on a checkpoint of the model, in `folder`."""
    checkpoint = {
        "model": model.state_dict(),
        "model_args": model.config.to_args(),
        "tokenizer": tokenizer.to_dict(),
        "config": {"rows": rows},
    }
    folder.mkdir(exist_ok=True)
    save_checkpoint(checkpoint, folder / "ckpt.pt")
    settings = {"out_dir": folder, **settings}
    argv = [f"--{key}={value}" for key, value in settings.items()]
    export.main(configure(export.ExportConfig, argv))


@pytest.fixture
def exported(tmp_path):
    """`exported(model, tokenizer)`: export them to a directory. Returns its path."""

    def exported(model, tokenizer):
        run_export(tmp_path / "out", model, tokenizer, to=tmp_path / "to")
        return tmp_path / "to"

    return exported


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(exported, name):
    tokenizer = ByteTokenizer()
    ours = make_model(tokenizer, **MODELS[name])
    folder = exported(ours, tokenizer)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(told.values())  # no weight missing, unexpected or of another shape
    modern = "position" in MODELS[name]
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if modern else "GPT2LMHeadModel")
    idx = torch.randint(257, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(idx).logits
        assert logits.shape[-1] == 257  # without padding
        assert (ours.predict(idx)[..., :257] - logits).abs().max() <= 1e-4

    theirs.generation_config.eos_token_id = None  # continue after an end-of-text
    continued = theirs.generate(idx[:, :5], do_sample=False, max_new_tokens=50)
    expected = ours.generate(idx[:, :5], 50, temperature=0, vocab_size=257)
    assert continued.tolist() == expected.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_export_round_trip(exported, name):
    tokenizer = ByteTokenizer()
    ours = make_model(tokenizer, **MODELS[name])
    back = GPT.from_pretrained(str(exported(ours, tokenizer)))
    expected = ours.state_dict()
    for key, weight in back.state_dict().items():
        if key in expected:
            assert weight.equal(expected.pop(key)[: len(weight)]), key
        else:
            assert key.endswith(".bias") and not weight.any(), key
    assert not expected
    for key in ("position", "qk_norm", "kv_heads", "rope_theta", "hidden_width", "tied", "gelu"):
        assert getattr(back.config, key) == getattr(ours.config, key), key
    assert back.config.block_size == 64 and back.config.vocab_size == 257


def test_exported_tokenizer_matches(exported, tokenizer):
    model = make_model(tokenizer, n_layer=1, n_embd=4, n_head=1)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(model, tokenizer))
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.eot and theirs.model_max_length == 64
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text, allow_eot=True).tolist()
        assert theirs(text)["input_ids"] == ids, name
        assert theirs.decode(ids) == text, name


def test_exported_tokenizer_is_read_back(tmp_path, tokenizer):
    for name, text in tokenizer_files(tokenizer, 64).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    back = read_tokenizer(tmp_path)
    assert (back.kind, back.vocab_size, back.eot) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    for name, text in TEXTS.items():
        expected = tokenizer.encode(text, allow_eot=True).tolist()
        assert back.encode(text, allow_eot=True).tolist() == expected, name
        assert back.decode(expected) == text


def test_hub_tokenizer_is_read(tmp_path):
    """Older files have merges as text, end-of-text among the other tokens, and fewer keys."""
    tokenizer = make_tokenizer("bpe")
    file = json.loads(to_tokenizers(tokenizer).to_str())
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    file["model"]["vocab"][EOT] = tokenizer.eot
    del file["pre_tokenizer"]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    back = read_tokenizer(tmp_path)
    assert back.encode(CODE).tolist() == tokenizer.encode(CODE).tolist()
    assert back.eot == tokenizer.eot


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.update(normalizer={"type": "NFC"}),
        lambda file: file["pre_tokenizer"].update(add_prefix_space=True),
        lambda file: file["model"]["merges"].reverse(),
        lambda file: file["added_tokens"].append({**file["added_tokens"][0], "content": "<|x|>"}),
        lambda file: file["model"].update(type="Unigram", vocab=[["a", 0]]),
        lambda file: file.pop("model"),
    ],
)
def test_foreign_tokenizer_is_refused(tmp_path, change):
    file = json.loads(to_tokenizers(make_tokenizer("bpe")).to_str())
    change(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["classic", "shared keys"])
def test_directory_samples_the_same_text(tmp_path, capsys, name):
    tokenizer = CharTokenizer(CHARACTERS, eot=True)
    run_export(tmp_path, make_model(tokenizer, **MODELS[name]), tokenizer, to=tmp_path / "to")
    texts = []
    for init_from in (tmp_path / "ckpt.pt", tmp_path / "to"):
        argv = [f"--init_from={init_from}", "--start=abc", "--num_samples=2", "--device=cpu"]
        capsys.readouterr()
        sample.main(configure(sample.SampleConfig, [*argv, "--max_new_tokens=40"]))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 60


@pytest.mark.parametrize("kind", ["char without end", "byte", "bpe"])
def test_export_is_evaluated_on_its_data(tmp_path, capsys, kind):
    tokenizer, text = make_tokenizer(kind), "".join(TEXTS.values())
    write_dataset(tmp_path / "data", tokenizer, {"train": [text], "val": [text]}, "texts")
    run_export(tmp_path, make_model(tokenizer, rows=0), tokenizer, to=tmp_path / "to")
    results = []
    for init_from in (tmp_path / "ckpt.pt", tmp_path / "to"):
        argv = [f"--init_from={init_from}", f"--data_dir={tmp_path / 'data'}", "--device=cpu"]
        capsys.readouterr()
        evaluate.main(configure(evaluate.EvaluateConfig, [*argv, "--json"]))
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "reviews.csv"])
@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_ids_of_real_text(request, name, kind):
    path = os.path.join(os.environ.get("BRISK_DATA", ""), name)
    if not os.path.exists(path):
        pytest.skip("BRISK_DATA names no folder with it")
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read(1_000_000)
    if kind == "gpt2":
        tokenizer = request.getfixturevalue("gpt2_tokenizer")
    else:
        tokenizer = train_bpe([text[:300_000]], 2000)
    assert to_tokenizers(tokenizer).encode(text).ids == tokenizer.encode(text).tolist()


def test_invalid_utf8_decodes_the_same():
    tokenizer = ByteTokenizer()
    theirs = to_tokenizers(tokenizer)
    for broken in (b"a\xe8\xaf", b"\xff\xfe", b"\xf0\x9f\x98a", b"\xc0\x80", b"\xed\xa0\x80"):
        assert theirs.decode(list(broken)) == tokenizer.decode(list(broken))


def test_unknown_character_is_an_error_there():
    with pytest.raises(Exception, match="UNK"):
        to_tokenizers(CharTokenizer("abc")).encode("abd")


def test_merges_produce_the_tokens():
    ranks = {bytes([b]): b for b in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
    assert last_merge(b"abc", ranks) == (b"a", b"bc")  # bc is merged before ab
    assert last_merge(b"a", ranks) is None
    with pytest.raises(UserError, match="no merge produces"):
        last_merge(b"xyz", {**ranks, b"xyz": 259})


def test_pipeline_stops_at_end_of_text(exported):
    """End-of-text has the id of a character that the model generates after some others."""
    tokenizer = CharTokenizer(CHARACTERS, eot=True)
    model = make_model(tokenizer, rows=0, **MODELS["modern"])
    prompt = torch.tensor([[3]])
    drawn = model.generate(prompt, 40, temperature=0)[0, 1:].tolist()
    length = next(i for i in range(3, 40) if drawn[i] not in [3, tokenizer.eot, *drawn[:i]])
    assert tokenizer.eot not in drawn[:length]
    swap = [drawn[length], tokenizer.eot]
    with torch.no_grad():
        model.lm_head.weight[swap] = model.lm_head.weight[swap[::-1]]
    folder = exported(model, tokenizer)
    write = transformers.pipeline("text-generation", model=str(folder))
    options = dict(do_sample=False, return_full_text=False)
    text = write(tokenizer.decode([3]), **options)[0]["generated_text"]
    assert text == tokenizer.decode(drawn[:length])


def test_pipeline_stops_at_the_context_end(exported):
    tokenizer = CharTokenizer(CHARACTERS)
    folder = exported(make_model(tokenizer), tokenizer)
    write = transformers.pipeline("text-generation", model=str(folder))
    text = write("abc", do_sample=True)[0]["generated_text"]
    assert text.startswith("abc") and len(text) == 64


REFUSED = {
    "relu2": (dict(mlp="relu2"), "mlp=relu2 where GPT-2 has mlp=gelu"),
    "n-grams": (dict(**MODERN, ngrams=3), "ngrams=3 where Qwen3 has ngrams=1"),
    "n-grams in GPT-2": (dict(ngrams=2), "ngrams=2 where GPT-2 has ngrams=1"),
    "plain queries": ({**MODERN, "qk_norm": False}, "qk_norm=False where Qwen3"),
    "rotary with biases": ({**MODERN, "bias": True}, "bias=True where Qwen3 has bias=False"),
    "rms": (dict(norm="rms"), "norm=rms where GPT-2 has norm=layer"),
    "shared keys": (dict(n_kv_head=2), "n_kv_head=2 where GPT-2 has n_kv_head=4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_field_is_named(tmp_path, name):
    fields, words = REFUSED[name]
    tokenizer = ByteTokenizer()
    with pytest.raises(UserError, match=words):
        run_export(tmp_path, make_model(tokenizer, **fields), tokenizer, to=tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_unsupported_tokenizer_is_refused(tmp_path):
    description = train_bpe(["some text"], 257).to_dict()
    for tokenizer, words in {
        WordTokenizer(["a", "b"]): "--tokenizer=bpe",
        CharTokenizer("aba"): "duplicate",
        CharTokenizer("a\ud800"): "surrogate",
        from_dict({**description, "pattern": r"\w+|\W+"}): "pattern other than",
        from_dict(
            {**description, "special_tokens": {EOT: 256, "<|x|>": 257}}
        ): "special tokens other",
    }.items():
        with pytest.raises(UserError, match=words):
            run_export(tmp_path, make_model(tokenizer), tokenizer, to=tmp_path / "to")
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_foreign_files_are_not_replaced(tmp_path, capsys):
    tokenizer = ByteTokenizer()
    model = make_model(tokenizer)

    def to(folder, **settings):
        run_export(tmp_path / "out", model, tokenizer, to=folder, **settings)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="mine exists and is not an unchanged export"):
            to(tmp_path / "mine", overwrite=overwrite)
        with pytest.raises(UserError, match=r"thesis\.txt exists and is not an unchanged export"):
            to(tmp_path / "mine" / "thesis.txt", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"

    (tmp_path / "empty").mkdir()
    to(tmp_path / "empty")
    wte = "transformer.wte.weight"
    before = load_file(tmp_path / "empty" / "model.safetensors")[wte]
    with pytest.raises(UserError, match="earlier export; replace it with --overwrite"):
        to(tmp_path / "empty")
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    to(tmp_path / "empty", overwrite=True)
    after = load_file(tmp_path / "empty" / "model.safetensors")[wte]
    assert torch.equal(after[0], before[0] + 1) and torch.equal(after[1:], before[1:])

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "empty")
    theirs.save_pretrained(tmp_path / "empty")  # changed by another program
    with pytest.raises(UserError, match="not an unchanged export"):
        to(tmp_path / "empty", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine", "empty"}


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_files_have_the_default_mode(tmp_path):
    before = os.umask(0o027)
    try:
        run_export(tmp_path, make_model(ByteTokenizer()), ByteTokenizer(), to=tmp_path / "to")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "to").iterdir()} == {0o640}


def test_failed_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    tokenizer = ByteTokenizer()
    run_export(tmp_path / "out", make_model(tokenizer), tokenizer, to=tmp_path / "to")
    before = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("brisk.interop.huggingface.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        model = make_model(tokenizer, n_layer=1)
        run_export(tmp_path / "out", model, tokenizer, to=tmp_path / "to", overwrite=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "to"}


def test_command_line(tmp_path, script, quick_script):
    tokenizer = CharTokenizer(CHARACTERS, eot=True)
    run_export(
        tmp_path / "out", make_model(tokenizer), tokenizer, rows="documents", to=tmp_path / "a"
    )
    done = script("export.py", "--to=b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GPT2LMHeadModel" in done.stdout and f"begin each prompt with {EOT}" in done.stdout
    for one in (tmp_path / "a").iterdir():
        other = tmp_path / "b" / one.name
        if one.suffix == ".json":
            assert one.read_bytes() == other.read_bytes()
        else:  # the order of its header is not fixed
            theirs = load_file(other)
            assert all(weight.equal(theirs[key]) for key, weight in load_file(one).items())
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eot and config["vocab_size"] == tokenizer.vocab_size
    for argv in ([], ["--to=b"], ["--to=c", "--out_dir=none"]):
        done = quick_script("export.py", *argv, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_finetuning_checks_the_tokenizer(tmp_path, settings, script):
    """With another tokenizer, the ids would mean other tokens."""
    tokenizer = make_tokenizer("bpe")
    run_export(tmp_path / "run", make_model(tokenizer), tokenizer, to=tmp_path / "to")
    argv = settings(tmp_path / "out", init_from=tmp_path / "to", block_size=8)
    result = script("train.py", *argv)
    assert result.returncode == 2 and "has another tokenizer" in result.stderr
