"""sample.py: text on standard output, errors in one line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import evaluate
import sample
from brisk.data.bpe import BPETokenizer
from brisk.data.dataset import write_dataset
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError
from brisk.generation import generate
from configurator import configure, help_groups
from model import GPT, GPTConfig

SCRIPT = Path(sample.__file__)
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz语言模型"
DASHES = "---------------\n"


def tiny_bpe():
    """A tokenizer like GPT-2's, with two merges instead of 50000."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"the": 257}
    pattern = r" ?\p{L}+|\s+|[^\s\p{L}]+"
    encoding = tiktoken.Encoding(
        "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 258}
    )
    return BPETokenizer(encoding)


def write_checkpoint(path, vocab_size, prefix="", **more):
    """A checkpoint of a random model with nanoGPT's keys and `more`."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)
    state = GPT(config).state_dict()
    checkpoint = {
        "model": {prefix + name: 5 * weight for name, weight in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": config.to_args(),
        "iter_num": 100,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters"},
    }
    path.parent.mkdir(exist_ok=True)
    torch.save({**checkpoint, **more}, path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a run in `out/` that has a character tokenizer."""
    tokenizer = CharTokenizer(CHARACTERS).to_dict()
    write_checkpoint(tmp_path / "out" / "ckpt.pt", len(CHARACTERS) + 5, tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run sample.py in this process. Returns its standard output."""

    def run(*argv, samples=3, tokens=40):
        argv = [f"--num_samples={samples}", f"--max_new_tokens={tokens}", "--device=cpu", *argv]
        capsys.readouterr()  # discard earlier output
        sample.main(configure(sample.SampleConfig, argv))
        captured = capsys.readouterr()
        run.notices = captured.err
        return captured.out

    return run


def texts(out):
    """The samples in the output `out`, which ends with dashes."""
    *found, rest = out.split("\n" + DASHES)
    assert rest == ""
    return found


def in_a_process(folder, *argv):
    """Run sample.py in a subprocess, in a terminal that is not UTF-8, without a network."""
    (folder / "empty").mkdir(exist_ok=True)
    environment = {
        "PYTHONIOENCODING": "latin-1:replace",
        "OMP_NUM_THREADS": "1",  # faster for a model this small
        "TIKTOKEN_CACHE_DIR": str(folder / "empty"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    return subprocess.run(
        [sys.executable, SCRIPT, "--device=cpu", *argv],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )


def test_script(folder):
    done = in_a_process(folder, "--start=语 ab", "--num_samples=2", "--max_new_tokens=30")
    assert done.returncode == 0, done.stderr
    found = texts(done.stdout.decode("utf-8").replace("\r\n", "\n"))
    assert len(found) == 2 and all(text.startswith("语 ab") for text in found)
    assert all(len(text) == 34 and set(text) <= set(CHARACTERS) for text in found)
    assert b"ckpt.pt" in done.stderr and b"cpu" in done.stderr


def test_wrong_input_is_one_line_and_status_2(folder):
    done = in_a_process(folder, "--start=ABC é")
    assert done.returncode == 2 and done.stdout == b""
    last = done.stderr.decode("latin-1").splitlines()[-1]
    assert last.startswith("error:") and "'A'" in last and b"Traceback" not in done.stderr


def test_checkpoint_with_bpe_needs_no_network(folder):
    write_checkpoint(folder / "bpe" / "ckpt.pt", 320, tokenizer=tiny_bpe().to_dict())
    done = in_a_process(folder, "--out_dir=bpe", "--start=the", "--num_samples=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").startswith("the")


def test_num_samples_and_default_prompt(run):
    found = texts(run(samples=4))
    assert len(found) == 4 and len(set(found)) == 4
    assert all(text.startswith("\n") and len(text) == 41 for text in found)
    assert texts(run("--start=\n", samples=4)) == found
    assert texts(run("--start=ab", tokens=0)) == ["ab"] * 3


def test_text_depends_on_seed_and_number_only(run, monkeypatch):
    found = texts(run(samples=5))
    assert texts(run(samples=2)) == found[:2]
    assert set(texts(run("--seed=2", samples=5))).isdisjoint(found)
    monkeypatch.setattr(sample, "TOKENS_AT_ONCE", 2 * 32)  # batches of two, two and one
    assert texts(run(samples=5)) == found


def test_prompts_share_batches(run, folder, monkeypatch):
    lines = ["a", "bb the", "语", "long " * 8, "c", "d"]
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    found = texts(run("--prompts=prompts.txt", "--max_words=4", samples=2, tokens=20))
    sizes, generate = [], GPT.generate

    def counting_generate(model, prompts, *args, **options):
        sizes.append([len(prompt) for prompt in prompts])
        return generate(model, prompts, *args, **options)

    monkeypatch.setattr(GPT, "generate", counting_generate)
    for room, expected in (
        (9999, [[1, 1, 6, 6, 1, 1, 40, 40, 1, 1, 1, 1]]),
        (
            4 * 26,
            [[1, 1, 6, 6], [1, 1, 40], [40, 1, 1], [1, 1]],
        ),  # windows of 21, 26, 21, 32, 21, 21
        (1, [[n] for n in (1, 1, 6, 6, 1, 1, 40, 40, 1, 1, 1, 1)]),
    ):
        monkeypatch.setattr(sample, "TOKENS_AT_ONCE", room)
        sizes.clear()
        assert texts(run("--prompts=prompts.txt", "--max_words=4", samples=2, tokens=20)) == found
        assert sizes == expected


def test_temperature_top_k_and_top_p(run):
    greedy = texts(run("--temperature=0"))
    assert len(set(greedy)) == 1
    for option in ("--top_k=1", "--top_p=0"):
        assert texts(run(option)) == greedy
    assert len(set(texts(run("--top_k=0", "--temperature=2")))) == 3


def test_exact_window(run):
    found, exact = (texts(run(f"--exact_window={flag}", tokens=60)) for flag in (False, True))
    within = len("\n") + 32  # later tokens have less context
    assert [text[:within] for text in found] == [text[:within] for text in exact]
    assert found != exact


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_blocks_generate_the_same_text(run, folder):
    options = ["--temperature=0", "--num_samples=2", "--max_new_tokens=70"]
    for window in ("--exact_window=False", "--exact_window=True"):
        plain = in_a_process(folder, *options, window)
        compiled = in_a_process(folder, *options, window, "--compile=True")
        assert compiled.returncode == 0, compiled.stderr
        assert compiled.stdout == plain.stdout and len(plain.stdout) > 2 * 70


def test_prompt_file_longer_than_the_window(run, folder):
    prompt = "语言模型 and more\n" * 5
    (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
    assert all(text.startswith(prompt) for text in texts(run("--start=FILE:prompt.txt")))
    (folder / "empty.txt").touch()
    assert texts(run("--start=FILE:empty.txt")) == texts(run())


def test_unreadable_prompt_file(run, folder):
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        run("--start=FILE:nowhere.txt")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin1\.txt"):
        run("--start=FILE:latin1.txt")


def test_stop_text_ends_each_sample(run):
    whole = texts(run("--start=ab", samples=6, tokens=200))
    cut = texts(run("--start=ab", "--stop=b", samples=6, tokens=200))
    assert cut == ["ab" + text[2:].partition("b")[0] for text in whole]
    assert cut != whole


def test_end_of_text_ends_each_sample(run, folder):
    tokenizer = CharTokenizer("\nab", eot=True).to_dict()
    write_checkpoint(folder / "out" / "ckpt.pt", 4, tokenizer=tokenizer)
    whole = texts(run("--temperature=2", "--rows=windows", samples=6))
    assert any(EOT in text for text in whole)
    cut = texts(run("--temperature=2", "--rows=windows", f"--stop={EOT}", samples=6))
    assert cut == [text.partition(EOT)[0] for text in whole]
    assert texts(run(f"--start={EOT}ab", "--rows=windows", tokens=0))[0] == EOT + "ab"


def test_generation_ends_with_the_last_sample(run, monkeypatch):
    steps, sample_token = [], generate.sample_token
    counted = lambda *a: steps.append(1) or sample_token(*a)  # noqa: E731
    monkeypatch.setattr(generate, "sample_token", counted)
    run("--temperature=0", tokens=200)
    assert len(steps) == 200
    first_drawn = texts(run("--temperature=0", tokens=1))[0][-1]
    steps.clear()
    run("--temperature=0", f"--stop={first_drawn}", tokens=200)
    assert len(steps) == 1


@pytest.mark.parametrize("description", ["meta.json", "meta.pkl"])
def test_classic_checkpoint_of_a_compiled_model(run, folder, description):
    write_checkpoint(folder / "out" / "ckpt.pt", len(CHARACTERS), prefix="_orig_mod.")
    data = folder / "data" / "letters"
    if description == "meta.json":
        splits = {"train": [CHARACTERS], "val": [CHARACTERS]}
        write_dataset(data, CharTokenizer(CHARACTERS), splits, source="a test")
        (data / "meta.pkl").unlink()
    else:
        data.mkdir(parents=True)
        itos = dict(enumerate(CHARACTERS))
        stoi = {character: i for i, character in itos.items()}
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert all(text.startswith("语") for text in texts(run("--start=语")))


def test_default_tokenizer_is_gpt2(run, folder, monkeypatch):
    monkeypatch.setattr("brisk.interop.pretrained.gpt2", tiny_bpe)
    write_checkpoint(folder / "out" / "ckpt.pt", 320)
    assert texts(run("--start=the end"))[0].startswith("the end")
    assert "assuming GPT-2 encodings" in run.notices
    write_checkpoint(folder / "out" / "ckpt.pt", 65)
    with pytest.raises(UserError, match="259 tokens, but the model has 65"):
        run()


def test_init_from_a_file_or_directory(run, folder, monkeypatch):
    expected = run()
    (folder / "out" / "ckpt.pt").rename(folder / "model.pt")
    assert run("--init_from=model.pt") == expected

    transformers = pytest.importorskip("transformers")
    sizes = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=50257, n_positions=32)
    config = transformers.GPT2Config(**sizes, bos_token_id=258, eos_token_id=258)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "exported")
    monkeypatch.setattr("brisk.interop.pretrained.gpt2", tiny_bpe)
    assert texts(run("--init_from=exported", "--start=the"))[0].startswith("the")


def test_init_from_takes_the_folder_of_a_run(run):
    assert run("--init_from=out") == run()


def test_nothing_to_sample_from(run, folder):
    with pytest.raises(UserError, match="did you mean resume"):
        run("--init_from=resum")
    with pytest.raises(UserError, match="did you mean gpt2-xl"):
        run("--init_from=gpt2-xxl")
    with pytest.raises(UserError, match="nowhere"):
        run("--out_dir=nowhere")
    with pytest.raises(UserError, match="no end of text"):
        run(f"--stop={EOT}")


def test_config_files_of_train_py_are_accepted(run, folder):
    (folder / "train_letters.py").write_text(
        "out_dir = 'out'\nlearning_rate = 1e-3\nmax_iters = 5\ncompile = False\n"
    )
    assert len(texts(run("train_letters.py"))) == 3


# ----------------------------------------------------------------------------- prompts and out


def records(path):
    """The records in a file of samples."""
    *lines, rest = Path(path).read_text(encoding="utf-8").split("\n")
    assert rest == ""
    return [json.loads(line) for line in lines]


def test_out_records_texts_and_settings(run, monkeypatch):
    monkeypatch.setattr(sample, "TOKENS_AT_ONCE", 2 * 32)  # batches of two and one
    found = texts(run("--start=语 ab", "--out=samples.jsonl", "--top_p=0.9", "--stop=z"))
    written = records("samples.jsonl")
    assert [one["prompt"] + one["text"] for one in written] == found
    assert [one["sample"] for one in written] == [0, 1, 2]
    settings = {"seed": 1337, "temperature": 0.8, "top_k": 200, "top_p": 0.9, "stop": "z"}
    settings |= {"max_new_tokens": 40, "max_words": 0, "init_from": "resume", "out_dir": "out"}
    assert all(settings.items() <= one.items() for one in written)
    assert "语 ab" in Path("samples.jsonl").read_text(encoding="utf-8")  # readable, not escaped


def test_recorded_sample_is_reproducible(run):
    run("--start=ab", "--out=samples.jsonl", "--temperature=1.5", "--seed=7", "--max_words=3")
    for one in records("samples.jsonl"):
        keys = ("seed", "temperature", "top_k", "top_p", "max_words", "stop")
        argv = [f"--{key}={one[key]}" for key in keys]
        again = texts(run(f"--start={one['prompt']}", *argv, samples=one["sample"] + 1))
        assert again[-1] == one["prompt"] + one["text"]


def test_out_is_written_after_each_batch(run, monkeypatch):
    monkeypatch.setattr(sample, "TOKENS_AT_ONCE", 1)
    counts, sample_token = set(), generate.sample_token

    def counting(*args):
        counts.add(len(records("samples.jsonl")))
        return sample_token(*args)

    monkeypatch.setattr(generate, "sample_token", counting)
    run("--out=samples.jsonl")
    assert counts == {0, 1, 2}


def test_out_overwrites_nothing(run, folder):
    (folder / "mine.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.jsonl is there already; name a new file"):
        run("--out=mine.jsonl")
    assert (folder / "mine.jsonl").read_text() == "mine"
    (folder / "empty.jsonl").touch()
    run("--out=empty.jsonl")
    assert len(records("empty.jsonl")) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full")
def test_full_disk_is_one_line(run):
    with pytest.raises(UserError, match="No space left"):
        run("--out=/dev/full")


def test_prompts_are_lines_of_a_file(run, folder):
    (folder / "prompts.txt").write_bytes("语 ab\r\n\n  \n the \nFILE:x".encode())
    with pytest.raises(UserError, match=r"prompts\.txt, prompt 3: .*'F'"):  # before any is drawn
        run("--prompts=prompts.txt")
    (folder / "prompts.txt").write_bytes("语 ab\r\n\n  \n the \n".encode())
    found = texts(run("--prompts=prompts.txt", "--out=samples.jsonl", samples=2))
    assert found == [
        *texts(run("--start=语 ab", samples=2)),
        *texts(run("--start= the ", samples=2)),
    ]
    order = [(one["prompt"], one["sample"]) for one in records("samples.jsonl")]
    assert order == [("语 ab", 0), ("语 ab", 1), (" the ", 0), (" the ", 1)]
    together = texts(run("--prompts=prompts.txt", samples=2, tokens=100))  # past the window of 32
    alone = [texts(run(f"--start={start}", samples=2, tokens=100)) for start in ("语 ab", " the ")]
    assert together == [*alone[0], *alone[1]]
    (folder / "blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"blank\.txt has no prompt"):
        run("--prompts=blank.txt")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--start=FILE:"], "cannot read"),
        (["--start=FILE:a\0b"], "cannot read"),
        (["--prompts=nowhere.txt"], "nowhere.txt"),
        (["--prompts=latin1.txt"], "latin1.txt"),
        (["--prompts=out"], "out"),  # a folder
        (["--prompts=prompts.txt", "--start=x"], "give one of them"),
        (["--interactive", "--start=x"], "give one of them"),
        (["--interactive", "--prompts=prompts.txt"], "give one of them"),
        (["--out=out"], "cannot write"),
        (["--out=no/such/folder.jsonl"], "cannot write"),
        (["--out=latin1.txt"], "is there already"),
        (["--out=new.jsonl", "--top_next=3"], "leave one of them out"),
    ],
)
def test_settings_are_checked_before_loading(run, folder, monkeypatch, argv, words):
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sample, "read_pretrained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=words):
        run(*argv)
    assert not (folder / "new.jsonl").exists()


@pytest.mark.parametrize("setting", ["max_words=-1", "top_next=-1", "top_next=x", "max_words=1.5"])
def test_invalid_numbers(setting):
    with pytest.raises(UserError, match="whole number of at least 0"):
        configure(sample.SampleConfig, [f"--{setting}"])


def test_invalid_number_is_status_2(folder):
    done = in_a_process(folder, "--out=out")
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"error: ") and len(done.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------- words, likeliest


def test_max_words_ends_after_a_whole_word(run, folder):
    tokenizer = CharTokenizer("\n ab").to_dict()  # a word takes four characters or so
    write_checkpoint(folder / "out" / "ckpt.pt", 4, tokenizer=tokenizer)
    whole = texts(run("--start=a", "--temperature=3", samples=6, tokens=400))
    cut = texts(run("--start=a", "--temperature=3", "--max_words=5", samples=6, tokens=400))
    for text, rest in zip(cut, whole, strict=True):
        assert rest.startswith(text) and rest[len(text)].isspace()
        assert len(text[1:].split()) == 5 and not text[-1].isspace()
    short = texts(run("--start=a", "--temperature=3", "--max_words=5", samples=6, tokens=9))
    for text, rest in zip(short, whole, strict=True):  # no partial word at the token limit
        assert (
            len(text) <= 10 and rest.startswith(text) and (text == "a" or rest[len(text)].isspace())
        )


def test_max_words_lifts_the_token_limit(folder, capsys):
    tokenizer = CharTokenizer("\n ab").to_dict()
    write_checkpoint(folder / "out" / "ckpt.pt", 4, tokenizer=tokenizer)
    argv = ["--start=a", "--temperature=3", "--max_words=300", "--num_samples=1", "--device=cpu"]
    sample.main(configure(sample.SampleConfig, argv))
    (text,) = texts(capsys.readouterr().out)
    assert len(text) > 502 and len(text[1:].split()) == 300


def test_document_model_begins_and_ends_documents(run, folder):
    trained = {"tokenizer": CharTokenizer("\nab", eot=True).to_dict()}
    write_checkpoint(folder / "out" / "ckpt.pt", 4, **trained)
    plain = texts(run(f"--start={EOT}a", "--temperature=2", "--rows=windows", samples=6))
    expected = [text.removeprefix(EOT).partition(EOT)[0] for text in plain]
    assert texts(run("--start=a", "--temperature=2", samples=6)) == expected
    write_checkpoint(folder / "out" / "ckpt.pt", 4, **trained, config={"rows": "documents"})
    assert texts(run("--start=a", "--temperature=2", samples=6)) == expected
    assert any(len(text) < 41 for text in expected)
    stopped = texts(run("--start=a", "--temperature=2", "--stop=b", samples=6))
    assert stopped == [text.partition("b")[0] for text in expected]  # the end stops it all the same


def test_unknown_word_is_never_sampled(run, folder, monkeypatch):
    """A tokenizer with a token for unknown words."""
    monkeypatch.setattr(CharTokenizer, "unk", CHARACTERS.index("模"), raising=False)
    assert "模" not in run("--temperature=5", "--top_k=0", samples=20)
    assert "模" not in run("--top_next=99")
    monkeypatch.setattr(CharTokenizer, "unk", None)
    assert "模" in run("--temperature=5", "--top_k=0", samples=20)
    assert "模" in run("--top_next=99")


def test_word_model(run, folder):
    tokenizer = WordTokenizer("the cat sat on a mat c++ don't".split())
    write_checkpoint(
        folder / "out" / "ckpt.pt", tokenizer.vocab_size, tokenizer=tokenizer.to_dict()
    )
    found = texts(run("--start=The dog sat!", "--max_words=9", "--temperature=2", samples=8))
    assert "does not know 1 of the words" in run.notices  # dog
    for words in map(str.split, found):
        assert words[0] == "the" and words[2] == "sat" and len(words) == 3 + 9
        assert set(words[3:]) <= set(tokenizer.words)  # no unknown words
    table = run("--start=the cat", "--top_next=99").splitlines()[:-1]
    assert {line.split("'" if "don" not in line else '"')[1] for line in table} == {
        f"{word} " for word in tokenizer.words
    }


@pytest.mark.parametrize("eot", [False, True])
def test_prompt_of_stop_words_is_noted(run, folder, eot):
    words = WordTokenizer("cat sat on a mat".split(), stop_words=["the", "of"], eot=eot)
    write_checkpoint(folder / "out" / "ckpt.pt", words.vocab_size, tokenizer=words.to_dict())
    options = ["--max_words=4", "--temperature=2", "--rows=windows", "--out=samples.jsonl"]
    found = texts(run("--start=The, of!", *options))
    assert [len(text.split()) for text in found] == [4, 4, 4]
    assert [one["text"] for one in records("samples.jsonl")] == found
    assert "note: the prompt is empty: it has only stop words" in run.notices
    assert texts(run("--start=", *options[:-1])) == found
    assert "note" not in run.notices and "note" not in (run("--start=the cat"), run.notices)[1]


def test_help_is_in_groups(capsys):
    for Config in (sample.SampleConfig, evaluate.EvaluateConfig):
        groups = help_groups(Config)
        assert "" not in groups and {"model", "output", "system"} <= groups.keys()
        assert all(comment for keys in groups.values() for comment in keys.values())


def test_top_next_matches_greedy(run):
    lines = run("--start=ab 语", "--top_next=4").splitlines()
    assert len(lines) == 5 and lines[-1] + "\n" == DASHES
    drawn = texts(run("--start=ab 语", "--temperature=0", tokens=1, samples=1))[0][-1]
    rank, token, percent = lines[0].split()
    assert (rank, token) == ("1", repr(drawn)) and percent.endswith("%")
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[:-1]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 100
    assert (
        run("--start=ab 语", "--top_next=4", "--temperature=3", "--top_k=1").splitlines() == lines
    )
    everything = run("--start=ab 语", "--top_next=1_000_000").splitlines()[:-1]
    assert len(everything) == len(CHARACTERS)  # without vocabulary padding
    assert abs(sum(float(line.split()[-1].rstrip("%")) for line in everything) - 100) < 0.3


@pytest.mark.parametrize("tokenizer", [tiny_bpe(), ByteTokenizer()], ids=["bpe", "byte"])
def test_top_next_of_partial_characters(run, folder, tokenizer):
    write_checkpoint(folder / "out" / "ckpt.pt", 320, tokenizer=tokenizer.to_dict())
    out = run("--start=语", "--top_next=300")
    assert r"b'\xe8'" in out and "'a'" in out and r"'\n'" in out and repr(EOT) in out
    assert len(out.splitlines()) == tokenizer.vocab_size + 1
