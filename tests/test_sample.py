"""sample.py as a person meets it: the text on standard output, mistakes in one line."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import sample
from brisk.corpus import write_dataset
from brisk.errors import UserError
from brisk.tokenizer import EOT, BPETokenizer, CharTokenizer
from configurator import configure
from model import GPT, GPTConfig

SCRIPT = Path(sample.__file__)
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz语言模型"
DASHES = "---------------\n"


def tiny_bpe():
    """GPT-2's kind of tokenizer, with two merges where GPT-2 has 50000."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"the": 257}
    pattern = r" ?\p{L}+|\s+|[^\s\p{L}]+"
    encoding = tiktoken.Encoding(
        "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 258}
    )
    return BPETokenizer(encoding)


def write_checkpoint(path, vocab_size, prefix="", **more):
    """A random model's checkpoint with nanoGPT's keys only, and `more`."""
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
    """The current directory, with a run in `out/` on a character tokenizer."""
    tokenizer = CharTokenizer(CHARACTERS).to_dict()
    write_checkpoint(tmp_path / "out" / "ckpt.pt", len(CHARACTERS) + 5, tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run sample.py's main in this process; its standard output."""

    def run(*argv, samples=3, tokens=40):
        argv = [f"--num_samples={samples}", f"--max_new_tokens={tokens}", "--device=cpu", *argv]
        capsys.readouterr()  # what the test's own preparations said
        sample.main(configure(sample.SampleConfig, argv))
        captured = capsys.readouterr()
        run.notices = captured.err
        return captured.out

    return run


def texts(out):
    """The samples in `out`, which ends in dashes."""
    *found, rest = out.split("\n" + DASHES)
    assert rest == ""
    return found


def in_a_process(folder, *argv):
    """sample.py started as a person starts it, in a terminal that is not UTF-8, with nothing to
    be had from the network."""
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


def test_as_a_script(folder):
    done = in_a_process(folder, "--start=语 ab", "--num_samples=2", "--max_new_tokens=30")
    assert done.returncode == 0, done.stderr
    found = texts(done.stdout.decode("utf-8").replace("\r\n", "\n"))
    assert len(found) == 2 and all(text.startswith("语 ab") for text in found)
    assert all(len(text) == 34 and set(text) <= set(CHARACTERS) for text in found)
    assert b"ckpt.pt" in done.stderr and b"cpu" in done.stderr


def test_a_mistake_is_one_line_and_status_2(folder):
    done = in_a_process(folder, "--start=ABC é")
    assert done.returncode == 2 and done.stdout == b""
    last = done.stderr.decode("latin-1").splitlines()[-1]
    assert last.startswith("error:") and "'A'" in last and b"Traceback" not in done.stderr


def test_a_checkpoint_with_a_bpe_inside_needs_no_network(folder):
    write_checkpoint(folder / "bpe" / "ckpt.pt", 320, tokenizer=tiny_bpe().to_dict())
    done = in_a_process(folder, "--out_dir=bpe", "--start=the", "--num_samples=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").startswith("the")


def test_number_of_samples_and_the_default_prompt(run):
    found = texts(run(samples=4))
    assert len(found) == 4 and len(set(found)) == 4
    assert all(text.startswith("\n") and len(text) == 41 for text in found)
    assert texts(run("--start=\n", samples=4)) == found
    assert texts(run("--start=ab", tokens=0)) == ["ab"] * 3


def test_text_depends_on_the_seed_and_the_number_only(run, monkeypatch):
    found = texts(run(samples=5))
    assert texts(run(samples=2)) == found[:2]
    assert set(texts(run("--seed=2", samples=5))).isdisjoint(found)
    monkeypatch.setattr(sample, "TOKENS_AT_ONCE", 2 * 32)  # two at once, then two, then one
    assert texts(run(samples=5)) == found


def test_temperature_top_k_and_top_p_reach_the_generation(run):
    greedy = texts(run("--temperature=0"))
    assert len(set(greedy)) == 1
    for option in ("--top_k=1", "--top_p=0"):
        assert texts(run(option)) == greedy
    assert len(set(texts(run("--top_k=0", "--temperature=2")))) == 3


def test_a_prompt_from_a_file_longer_than_the_window(run, folder):
    prompt = "语言模型 and more\n" * 5
    (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
    assert all(text.startswith(prompt) for text in texts(run("--start=FILE:prompt.txt")))
    (folder / "empty.txt").touch()
    assert texts(run("--start=FILE:empty.txt")) == texts(run())


def test_a_prompt_file_that_cannot_be_read(run, folder):
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        run("--start=FILE:nowhere.txt")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin1\.txt"):
        run("--start=FILE:latin1.txt")


def test_stop_text_cuts_each_sample(run):
    whole = texts(run("--start=ab", samples=6, tokens=200))
    cut = texts(run("--start=ab", "--stop=b", samples=6, tokens=200))
    assert cut == ["ab" + text[2:].partition("b")[0] for text in whole]
    assert cut != whole


def test_end_of_text_cuts_each_sample_and_is_not_shown(run, folder):
    tokenizer = CharTokenizer("\nab", eot=True).to_dict()
    write_checkpoint(folder / "out" / "ckpt.pt", 4, tokenizer=tokenizer)
    whole = texts(run("--temperature=2", samples=6))
    assert any(EOT in text for text in whole)
    cut = texts(run("--temperature=2", f"--stop={EOT}", samples=6))
    assert cut == [text.partition(EOT)[0] for text in whole]
    assert texts(run(f"--start={EOT}ab", tokens=0))[0] == EOT + "ab"


def test_generation_ends_once_all_samples_are_cut(run, monkeypatch):
    steps = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    run("--temperature=0", tokens=200)
    assert len(steps) == 200
    first_drawn = texts(run("--temperature=0", tokens=1))[0][-1]
    steps.clear()
    run("--temperature=0", f"--stop={first_drawn}", tokens=200)
    assert len(steps) == 1


@pytest.mark.parametrize("description", ["meta.json", "meta.pkl"])
def test_a_classic_checkpoint_of_a_compiled_model(run, folder, description):
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


def test_without_any_description_the_tokenizer_is_gpt2s(run, folder, monkeypatch):
    monkeypatch.setattr(sample, "gpt2", tiny_bpe)
    write_checkpoint(folder / "out" / "ckpt.pt", 320)
    assert texts(run("--start=the end"))[0].startswith("the end")
    assert "assuming GPT-2 encodings" in run.notices
    write_checkpoint(folder / "out" / "ckpt.pt", 65)
    with pytest.raises(UserError, match="259 tokens, the model 65"):
        run()


def test_init_from_a_file_and_a_hugging_face_directory(run, folder, monkeypatch):
    expected = run()
    (folder / "out" / "ckpt.pt").rename(folder / "model.pt")
    assert run("--init_from=model.pt") == expected

    transformers = pytest.importorskip("transformers")
    sizes = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=259, n_positions=32)
    config = transformers.GPT2Config(**sizes, bos_token_id=258, eos_token_id=258)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "exported")
    monkeypatch.setattr(sample, "gpt2", tiny_bpe)
    assert texts(run("--init_from=exported", "--start=the"))[0].startswith("the")


def test_what_there_is_nothing_to_sample_from(run, folder):
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
