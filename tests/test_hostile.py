"""Hostile files cannot run code, and their claims are checked. Each attack would create a file.

Config files are Python by design and not covered.
"""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, exit_line

import export
import plot
import sample
import train
from brisk.data.dataset import load_tokenizer
from brisk.errors import one_line
from configurator import configure

SAMPLE = {"device": "cpu", "num_samples": 1, "max_new_tokens": 4, "start": "a"}


@pytest.fixture
def marker(tmp_path):
    """The path that each attack creates if it succeeds."""
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, char_data):
    """A complete run of one step: a folder with ckpt.pt, last.pt and metrics.jsonl."""
    out = tmp_path_factory.mktemp("trained") / "out"
    given = {**TINY, "data_dir": char_data, "out_dir": out, "max_iters": 1}
    train.main(configure(train.TrainConfig, [f"--{k}={v}" for k, v in given.items()]))
    return out


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The model as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    argv = [f"--out_dir={trained}", f"--to={folder}"]
    export.main(configure(export.ExportConfig, argv))
    return folder


@pytest.fixture
def directory(exported, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def sampled(**changes):
    argv = [f"--{key}={value}" for key, value in {**SAMPLE, **changes}.items()]
    return exit_line(lambda: sample.main(configure(sample.SampleConfig, argv)))


class Calls:
    """An object whose unpickling calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    """{name: pickle} of attacks that create `marker` if read by a plain unpickler."""
    path = str(marker)
    made = {f"mkdir, protocol {n}": pickle.dumps(Calls(os.mkdir, path), n) for n in range(6)}
    made["exec"] = pickle.dumps(Calls(exec, f"open({path!r}, 'w')"))
    made["eval in a dict"] = pickle.dumps({"itos": Calls(eval, f"open({path!r}, 'w')")})
    made["system"] = pickle.dumps(Calls(os.system, f"touch '{path}'"))
    inner = pickle.dumps(Calls(os.mkdir, path))
    made["a pickle in a pickle"] = pickle.dumps(Calls(pickle.loads, inner))
    made["INST"] = b"(V" + path.encode() + b"\nios\nmkdir\n."
    made["OBJ"] = b"(cos\nmkdir\nV" + path.encode() + b"\no."
    return made


NAMES = list(attacks(Path("marker")))


@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_live(marker, name):
    pickle.loads(attacks(marker)[name])
    assert marker.exists()


# ----------------------------------------------------------------------------- pickles


def rewritten(checkpoint, new, payload):
    """Write `new`: a copy of `checkpoint` with another pickle and valid checksums."""
    with zipfile.ZipFile(checkpoint) as before, zipfile.ZipFile(new, "w") as after:
        for info in before.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            after.writestr(info.filename, payload if is_pickle else before.read(info))
        for info in after.filelist:
            info.external_attr = 0  # as PyTorch writes it


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [False, True], ids=["archive", "bare"])
def test_ckpt_pt_runs_nothing(trained, marker, tmp_path, name, bare):
    payload, path = attacks(marker)[name], tmp_path / "ckpt.pt"
    if bare:
        path.write_bytes(payload)
    else:
        rewritten(trained / "ckpt.pt", path, payload)
    assert "ckpt.pt" in sampled(out_dir=tmp_path)
    resume = ["--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu"]
    assert "ckpt.pt" in exit_line(lambda: train.main(configure(train.TrainConfig, resume)))
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_meta_pkl_runs_nothing(char_data, marker, tmp_path, name):
    data = shutil.copytree(char_data, tmp_path / "data")
    (data / "meta.json").unlink()
    (data / "meta.pkl").write_bytes(attacks(marker)[name])
    given = {**TINY, "data_dir": data, "out_dir": tmp_path / "out"}
    argv = [f"--{key}={value}" for key, value in given.items()]
    assert "meta.pkl" in exit_line(lambda: train.main(configure(train.TrainConfig, argv)))
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [False, True], ids=["archive", "bare"])
def test_pytorch_model_bin_runs_nothing(trained, directory, marker, name, bare):
    (directory / "model.safetensors").unlink()
    if bare:
        (directory / "pytorch_model.bin").write_bytes(attacks(marker)[name])
    else:
        payload = attacks(marker)[name]
        rewritten(trained / "ckpt.pt", directory / "pytorch_model.bin", payload)
    assert "pytorch_model.bin" in sampled(init_from=directory)
    assert not marker.exists()


def test_meta_pkl_index_allocates_no_memory(tmp_path, forked, char_data):
    """LONG_BINPUT with an index of four billion: the unpickler in C allocates such a table."""
    data = shutil.copytree(char_data, tmp_path / "data")
    (data / "meta.json").unlink()
    (data / "meta.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xffX\x04\x00\x00\x00itosK\x01s.")
    given = {**TINY, "data_dir": data, "out_dir": tmp_path / "out"}
    result = forked("train.py", [f"--{k}={v}" for k, v in given.items()], tmp_path, memory=2**31)
    assert result.returncode == 2 and "meta.pkl" in result.stderr
    assert "MemoryError" not in result.stderr


# ----------------------------------------------------------------------------- other files


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pickle_under_another_name_is_refused(directory, marker, name):
    (directory / name).write_bytes(attacks(marker)["mkdir, protocol 2"])
    assert name in sampled(init_from=directory)
    assert not marker.exists()


def test_code_next_to_a_model_is_not_run(directory, marker):
    """Code for `trust_remote_code` is ignored."""
    code = f"open({str(marker)!r}, 'w')\nclass C: pass\n"
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil", "conftest", "setup"):
        (directory / f"{module}.py").write_text(code)
    maps = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.C"}
    for name in ("config.json", "tokenizer_config.json"):
        contents = json.loads((directory / name).read_text())
        contents |= {"auto_map": maps, "trust_remote_code": True, "tokenizer_class": "C"}
        (directory / name).write_text(json.dumps(contents))
    assert sampled(init_from=directory) is None
    assert not marker.exists()


@pytest.mark.parametrize("where", ["../outside", "/absolute", "sub/../../outside"])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_weight_index_stays_in_its_folder(directory, marker, tmp_path, where, suffix):
    outside = tmp_path / f"outside{suffix}"
    os.replace(directory / "model.safetensors", tmp_path / "outside.safetensors")
    (tmp_path / "outside.bin").write_bytes(attacks(marker)["exec"])
    (directory / "sub").mkdir()
    shard = str(outside) if where == "/absolute" else where + suffix
    index = {"weight_map": {"transformer.wte.weight": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its folder" in sampled(init_from=directory)
    assert not marker.exists()


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": []}}'])
def test_invalid_weight_index(directory, index):
    (directory / "model.safetensors").unlink()  # it has priority over the index
    (directory / "model.safetensors.index.json").write_text(index)
    assert "index" in sampled(init_from=directory)


def code_as_text(marker):
    return f"__import__('os').mkdir({str(marker)!r})"


def test_meta_json_is_never_executed(char_data, marker, tmp_path):
    data = shutil.copytree(char_data, tmp_path / "data")
    meta, code = json.loads((data / "meta.json").read_text()), code_as_text(marker)
    for key in ("format", "dtype", "vocab_size", "splits", "tokenizer"):
        (data / "meta.json").write_text(json.dumps({**meta, key: code}))
        assert "meta.json" in exit_line(load_tokenizer, data)
    for kind in (code, "os.mkdir", "CharTokenizer", "__class__"):
        tokenizer = {**meta["tokenizer"], "kind": kind, "path": str(marker)}
        (data / "meta.json").write_text(json.dumps({**meta, "tokenizer": tokenizer}))
        assert "unknown tokenizer kind" in exit_line(load_tokenizer, data)
    (data / "meta.json").write_text(json.dumps({**meta, "source": code}))
    assert exit_line(load_tokenizer, data) is None
    assert not marker.exists()


def test_metrics_jsonl_is_never_executed(trained, marker, tmp_path):
    run = tmp_path / "$\\frac{$"  # matplotlib would typeset this name
    run.mkdir()
    lines = (trained / "metrics.jsonl").read_bytes()
    hostile = [code_as_text(marker).encode(), attacks(marker)["exec"], b"[" * 100_000, b"\xff\x00"]
    hostile += [b'{"step": 1' + b"0" * 400 + b', "loss": 1}', b'{"step": 1e999, "loss": NaN}']
    (run / "metrics.jsonl").write_bytes(b"\n".join([*hostile, lines]))
    argv = [str(run), f"--to={tmp_path / 'a.png'}", "--title=$\\frac{$"]
    assert exit_line(plot.main, argv) is None and (tmp_path / "a.png").exists()
    (run / "metrics.jsonl").write_bytes(b"\n".join(hostile))
    assert "no losses" in exit_line(plot.main, argv)
    assert not marker.exists()


def test_prompt_file_cannot_name_other_files(trained, tmp_path, capsys):
    """FILE: works on the command line, not in a file of prompts."""
    (tmp_path / "secret.txt").write_text("Shall I compare thee")
    (tmp_path / "prompts.txt").write_text(f"FILE:{tmp_path / 'secret.txt'}\n")
    error = sampled(out_dir=trained, start="", prompts=tmp_path / "prompts.txt")
    assert "prompt 1" in error and "characters" in error  # the path is treated as text


# ----------------------------------------------------------------------------- claims


def with_claims(trained, path, **claims):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    for key, value in claims.items():
        place = checkpoint if key in checkpoint else checkpoint["model_args"]
        place[key] = value
    torch.save(checkpoint, path)
    return path


HUGE = [10**9, 10**12, 10**18, 2**63, -1, 0, 2.5, "12", None]


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "vocab_size", "block_size"])
def test_sizes_in_a_checkpoint_are_checked(trained, tmp_path, forked, key):
    for value in HUGE:
        path = with_claims(trained, tmp_path / "ckpt.pt", **{key: value})
        assert sampled(init_from=path) is not None
    path = with_claims(trained, tmp_path / "ckpt.pt", **{key: 10**9})
    argv = [f"--init_from={path}", "--device=cpu"]
    result = forked("sample.py", argv, tmp_path, seconds=20, memory=2**31)
    assert result.returncode == 2 and result.stderr.startswith(("error: ", "checkpoint "))


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions"])
def test_sizes_in_config_json_are_checked(directory, forked, tmp_path, key):
    config = json.loads((directory / "config.json").read_text())
    for value in [*HUGE, [], {}, True, float("nan"), float("inf")]:
        (directory / "config.json").write_text(json.dumps({**config, key: value}))
        assert sampled(init_from=directory) is not None
    (directory / "config.json").write_text(json.dumps({**config, key: 10**9}))
    argv = [f"--init_from={directory}", "--device=cpu"]
    result = forked("sample.py", argv, tmp_path, seconds=20, memory=2**31)
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**6, 0])
def test_length_in_a_safetensors_header(directory, length):
    path = directory / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "model.safetensors" in sampled(init_from=directory)


@pytest.mark.parametrize("tokens", [10**18, 2**63, -1, 0, 1.5, "9", None, [], True])
def test_token_counts_in_meta_json(char_data, tmp_path, tokens):
    data = shutil.copytree(char_data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    meta["splits"]["train"]["tokens"] = tokens
    (data / "meta.json").write_text(json.dumps(meta))
    assert "meta.json" in exit_line(load_tokenizer, data)


def test_expanded_weight_is_refused(trained, tmp_path):
    state = torch.load(trained / "ckpt.pt", weights_only=True)["model"]
    weight = torch.zeros(1).expand(10**12, 16)
    for odd in (weight, torch.zeros(3, dtype=torch.int64), torch.empty(3, device="meta"), 1.0):
        claims = {"model": {**state, "lm_head.weight": odd}}
        path = with_claims(trained, tmp_path / "ckpt.pt", vocab_size=10**12, **claims)
        assert "is not a weight" in sampled(init_from=path)


def test_compressed_checkpoint_is_refused(trained, tmp_path):
    """PyTorch does not compress checkpoints. A compressed one may expand a thousandfold."""
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(trained / "ckpt.pt") as before:
        with zipfile.ZipFile(path, "w") as after:
            for info in before.infolist():
                after.writestr(info.filename, before.read(info), zipfile.ZIP_DEFLATED)
            for info in after.filelist:
                info.external_attr = 0  # as PyTorch writes it
    assert "larger than the file" in sampled(init_from=path)


def test_repeated_record_is_refused(trained, tmp_path):
    path = Path(shutil.copy(trained / "ckpt.pt", tmp_path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/long", bytes(2**16))
        archive.filelist[-1].external_attr = 0
        archive.filelist += archive.filelist[-1:] * 1000
    assert "larger than the file" in sampled(init_from=path)


SETTINGS = [("eval_interval", 0), ("batch_size", -1), ("log_interval", 0), ("beta1", 7.0)]
SETTINGS += [("learning_rate", float("nan")), ("eval_iters", 2**70), ("rows", "columns")]


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_settings_in_a_checkpoint_are_checked(trained, tmp_path, key, value):
    settings = torch.load(trained / "ckpt.pt", weights_only=True)["config"]
    with_claims(trained, tmp_path / "ckpt.pt", config={**settings, key: value})
    argv = ["--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu"]
    error = exit_line(lambda: train.main(configure(train.TrainConfig, argv)))
    assert f"{key}={value!r} in the checkpoint" in error


def test_invalid_entry_is_named(trained, tmp_path):
    for key, value in {
        "iter_num": -1,
        "position": 2**63,
        "best_val_loss": torch.zeros(2),
        "optimizer": [1],
        "config": None,
        "scaler": 3,
    }.items():
        path = with_claims(trained, tmp_path / "ckpt.pt", **{key: value})
        assert key in sampled(init_from=path)


def odd_optimizers(state):
    """Optimizer states that `torch.optim` accepts, or fails on with various exceptions."""
    first = state["state"][0]
    return (
        {},
        {"param_groups": [], "state": {}},
        {**state, "param_groups": state["param_groups"][:1]},
        {**state, "state": {**state["state"], 0: {**first, "exp_avg": torch.zeros(3)}}},
        {**state, "state": {**state["state"], 0: {"exp_avg": first["exp_avg"]}}},
        {**state, "state": {**state["state"], 0: {**first, "exp_avg_sq": "x"}}},
        {**state, "state": 5},
        {**state, "param_groups": [None, None]},
        {**state, "param_groups": [{"params": 7}, {"params": "ab"}]},
    )


def test_invalid_optimizer_state_is_one_line(trained, tmp_path):
    state = torch.load(trained / "ckpt.pt", weights_only=True)["optimizer"]
    argv = ["--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu", "--max_iters=3"]
    for odd in odd_optimizers(state):
        with_claims(trained, tmp_path / "ckpt.pt", optimizer=odd)
        error = exit_line(lambda: train.main(configure(train.TrainConfig, argv)))
        assert error and "optimizer" in error


def test_error_has_no_terminal_controls():
    hostile = "\x1b]0;owned\x07 \x1b[2J \x9b31m \u202e" + "x" * 10**6 + "\r\nend"
    line = one_line(hostile)
    assert len(line) < 1100 and line.isprintable() and line.endswith("end")
    assert one_line("größe 好") == "größe 好"
