"""Config files and --key=value: compatible with nanoGPT, checked, errors in one line."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import configurator
from brisk.errors import UserError
from configurator import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UnitFloat,
    as_dict,
    checked,
    configure,
    key_types,
)
from evaluate import EvaluateConfig
from export import ExportConfig
from sample import SampleConfig
from train import TrainConfig


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # folder of the run
    dataset: str = "openwebtext"  # data set
    batch_size: PositiveInt = 12  # sequences in a micro-batch
    max_iters: NonNegativeInt = 600000  # the last step's number
    seed: int = 1337  # any whole number
    learning_rate: NonNegativeFloat = 6e-4  # the largest
    min_lr: float = 6e-5  # the smallest
    dropout: UnitFloat = 0.0  # a share
    bias: bool = False  # biases or not
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # precision
    compile: bool | Literal["auto"] = "auto"  # compile or not
    given: tuple = field(default=(), compare=False)


@pytest.fixture
def config_file(tmp_path):
    """Write a config file; its path."""

    def write(text, name="config.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def from_file(config_file, text, *argv):
    return configure(Settings, [config_file(text), *argv])


def error_of(*argv, Config=Settings):
    with pytest.raises(UserError) as caught:
        configure(Config, list(argv))
    return str(caught.value)


@pytest.fixture
def said(capsys):
    """What was printed, to a terminal."""

    def said():
        captured = capsys.readouterr()
        return captured.out + captured.err

    return said


# ----------------------------------------------------------------------------- order


def test_defaults():
    config = configure(Settings, [])
    assert config == Settings() and config.given == ()


def test_later_arguments_win(config_file):
    path = config_file("batch_size = 8\nmax_iters = 5")
    assert configure(Settings, [path, "--batch_size=4"]).batch_size == 4
    assert configure(Settings, ["--batch_size=4", path]).batch_size == 8
    other = config_file("batch_size = 2", "other.py")
    config = configure(Settings, [path, other])
    assert (config.batch_size, config.max_iters) == (2, 5)
    assert configure(Settings, ["--batch_size=1", "--batch_size=3"]).batch_size == 3


def test_given_lists_the_keys_set(config_file):
    config = from_file(config_file, "batch_size = 12\n_x = 5\nimport os", "--min-lr=0")
    assert set(config.given) == {"batch_size", "min_lr"}  # also where it is the default's value


def test_given_omits_keys_only_read(config_file):
    text = """
def helper():
    dropout = 0.5
    return [seed for seed in range(3)]

class Helper:
    bias = True

_x = [max_iters for max_iters in range(3)]
min_lr = learning_rate / 10
"""
    config = from_file(config_file, text)
    assert config.given == ("min_lr",)
    assert (config.dropout, config.max_iters, config.bias) == (0.0, 600000, False)


@pytest.mark.parametrize(
    "text",
    [
        "batch_size = batch_size",
        "batch_size: int = 12",
        "batch_size += 0",
        "for batch_size in (8, 12): pass",
        "if True:\n    batch_size = 12",
        "(batch_size, min_lr) = 12, min_lr",
        "from math import floor as _floor\nbatch_size = _floor(12.5)",
        "globals()['batch_size'] = 24 // 2 * 1 + 500 - 500",
    ],
)
def test_every_kind_of_assignment_counts(config_file, text):
    config = from_file(config_file, text)
    assert config.batch_size == 12
    if "globals" not in text:  # seen only where it changes something
        assert "batch_size" in config.given


# ----------------------------------------------------------------------------- config files


def test_config_file_scope(config_file):
    text = """
# the kind of file people have for nanoGPT
import time
_n_gpu = 8
batch_size = 5 * _n_gpu
min_lr = learning_rate / 10
out_dir = 'out-' + dataset + str(int(math.sqrt(16)))
dropout = float(np.float32(0.5))
max_iters = int(torch.tensor(7))
assert os.path and pickle.dumps and time.time() > 0 and __file__
"""
    config = from_file(config_file, text)
    config_after_flag = configure(Settings, ["--learning_rate=2", config_file(text)])
    assert config.batch_size == 40 and config.min_lr == 6e-4 / 10
    assert config_after_flag.min_lr == 0.2  # the current value, not the default
    assert config.out_dir == "out-openwebtext4"
    assert config.dropout == 0.5 and config.max_iters == 7


def test_config_files_build_on_each_other(config_file):
    first = config_file("learning_rate = 1.0")
    config = configure(Settings, [first, config_file("min_lr = learning_rate / 10", "b.py")])
    assert config.min_lr == 0.1


def test_nanogpt_batch_scaling_variables(config_file, said):
    """`5 * 8`, and helpers without an underscore, which are told of and used."""
    config = from_file(config_file, "batch_size = 5 * 8\nn_gpu = 8\nmax_iters = 100 * n_gpu")
    assert config.batch_size == 40 and config.max_iters == 800
    notice = said()
    assert notice.count("\n") == 1 and "n_gpu" in notice and "ignored" in notice


def test_numpy_and_torch_scalars_in_a_file(config_file):
    text = "batch_size = np.int64(4)\nmin_lr = np.float64(0.5)\nlearning_rate = torch.tensor(0.5)"
    config = from_file(config_file, text)
    assert (config.batch_size, config.min_lr, config.learning_rate) == (4, 0.5, 0.5)
    assert type(config.batch_size) is int and type(config.learning_rate) is float


def test_modules_functions_underscores_ignored(config_file, said):
    text = "import json as batch_sizes\ndef seeds(): pass\nclass Drop: pass\n_dropout = 5\n"
    config = from_file(config_file, text)
    assert config == Settings() and said() == ""


def test_keys_of_other_scripts_are_accepted(config_file, said):
    """`python sample.py config/train_shakespeare_char.py` works; so does the other way."""
    text = "batch_size = 3\nnum_samples = 5\ntop_k = 200\nn_layer = 4\nwandb_log = True"
    assert from_file(config_file, text).given == ("batch_size",)
    assert said() == ""


def test_misspelled_key_in_a_file(config_file):
    error = error_of(config_file("x = 1\nbatchsize = 3"))
    assert "batchsize" in error and "did you mean batch_size?" in error and "config.py" in error


def test_unrelated_name_in_a_file_is_noted(config_file, said):
    assert from_file(config_file, "weather = 'fine'").given == ()
    out = said()
    assert out.count("\n") == 1 and "weather" in out


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("batch_size = 3\nbatch_size = = 4", 2, "SyntaxError"),
        ("\n\nbatch_size = 1 / 0", 3, "ZeroDivisionError"),
        ("batch_size = batches", 1, "batches"),
        ("def f():\n    return 1 / 0\n\nbatch_size = f()", 2, "ZeroDivisionError"),
        ("import no_such_module", 1, "no_such_module"),
        ("raise UserWarning", 1, "UserWarning"),
    ],
)
def test_failing_config_file_names_its_line(config_file, text, line, words):
    error = error_of(config_file(text))
    assert f"config.py, line {line}:" in error and words in error


@pytest.mark.parametrize(
    "text, key",
    [
        ("batch_size = 'many'", "batch_size"),
        ("batch_size = [1, 2]", "batch_size"),
        ("batch_size = None", "batch_size"),
        ("learning_rate = True", "learning_rate"),
        ("dataset = 5", "dataset"),
        ("batch_size = np.zeros(3)", "batch_size"),
    ],
)
def test_wrong_type_in_a_file(config_file, text, key):
    error = error_of(config_file(text))
    assert error.startswith(key) and "config.py" in error


def test_missing_config_file():
    assert "config/train_gpt5.py" in error_of("config/train_gpt5.py")
    assert "--batch_size=3" in error_of("batch_size=3")  # the dashes forgotten


def test_folder_or_binary_as_config_file(tmp_path):
    assert str(tmp_path) in error_of(str(tmp_path))
    (tmp_path / "train.bin").write_bytes(bytes(range(256)))
    assert "train.bin" in error_of(str(tmp_path / "train.bin"))


def test_config_files_share_no_variables(config_file):
    first = config_file("_helper = 5")
    assert "_helper" in error_of(first, config_file("batch_size = _helper", "second.py"))


# ----------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-3", 1e-3),
        ("--batch_size=64.0", 64),
        ("--batch_size=1e3", 1000),
        ("--batch-size=3", 3),
        ("--max_iters=1_000", 1000),
        ("--seed=-5", -5),
        ("--min-lr=-0.5", -0.5),
        ("--bias=True", True),
        ("--bias=False", False),
        ("--bias", True),  # a switch alone turns it on
        ("--compile", True),
        ("--compile=True", True),
        ("--compile=auto", "auto"),
        ("--dtype=bfloat16", "bfloat16"),
        ("--dataset=7", "7"),  # a folder may be called 7, or None
        ("--dataset=None", "None"),
        ("--dataset=", ""),
        ("--out_dir=a=b", "a=b"),
        ("--out_dir='quoted'", "'quoted'"),
        ("-batch_size=5", 5),
    ],
)
def test_command_line_values(argument, value):
    config = configure(Settings, [argument])
    (key,) = config.given
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--batch_size=0", "at least 1"),
        ("--batch_size=2.5", "whole number"),
        ("--batch_size=-3", "at least 1"),
        ("--batch_size=True", "whole number"),
        ("--batch_size=four", "whole number"),
        ("--batch_size=", "whole number"),
        ("--batch_size", "needs a value"),
        ("--dtype", "needs a value"),
        ("--bias=", "True or False"),
        ("--max_iters=-1", "at least 0"),
        ("--learning_rate=inf", "number"),
        ("--learning_rate=nan", "number"),
        ("--learning_rate=1e999", "number"),
        ("--learning_rate=-1", "at least 0"),
        ("--learning_rate=False", "number"),
        ("--dropout=1.5", "from 0 to 1"),
        ("--bias=1", "True or False"),
        ("--bias=true", "did you mean True?"),
        ("--bias='True'", "True or False"),
        ("--compile=1", "auto"),
        ("--compile=yes", "auto"),
        ("--dtype=bfloat61", "did you mean bfloat16?"),
        ("--dtype=16", "auto, float32 or bfloat16"),
    ],
)
def test_wrong_values_name_the_legal_ones(argument, words):
    error = error_of(argument)
    assert argument.lstrip("-").split("=")[0] in error and words in error


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e5000"])
def test_huge_numbers(number):
    for key in ("learning_rate", "batch_size", "dropout", "min_lr"):
        try:
            configure(Settings, [f"--{key}={number}"])
        except UserError as error:
            assert key in str(error)


def test_unknown_key_names_the_closest():
    assert "did you mean batch_size?" in error_of("--batchsize=3")
    assert "did you mean learning_rate?" in error_of("--learning-rat=3")
    far = error_of("--weather=fine")
    assert "--weather" in far and "did you mean" not in far and "--help" in far


def test_key_of_another_script_is_unknown():
    assert "num_samples" in error_of("--num_samples=3", Config=TrainConfig)


# A command line of anything: keys that are there, nearly there and not, with values of all kinds.
keys = st.sampled_from([*key_types(Settings)]) | st.text(max_size=12)
values = (
    st.integers().map(str)
    | st.integers(10**300, 10**400).map(str)
    | st.floats().map(str)
    | st.booleans().map(str)
    | st.sampled_from(["auto", "float32", "()", "[1]", "None", "1j", "b'x'", "{", "''", "-", "\\"])
    | st.text()
)
arguments = st.builds("--{}={}".format, keys, values) | st.text() | st.text().map("--{}".format)


@given(st.lists(arguments, max_size=4))
@example(["x=" + "y" * 400])
@example(["y" * 400])
@example(["\udcff=1"])
@example(["--learning_rate=" + "(" * 3000])
@example(["--learning_rate=" + "-" * 100_000 + "1"])
def test_fuzzed_command_line(argv):
    argv = [a.replace("\0", "") for a in argv if a not in ("-h", "--help")]  # execve knows no NUL
    argv = [a for a in argv if not a.endswith(".py")]
    try:
        config = configure(Settings, argv)
    except UserError:
        return
    for key, kind in key_types(Settings).items():
        value = getattr(config, key)
        assert checked(value, kind, key, "here") == value
    assert configure(Settings, argv) == config


@given(st.text())
def test_fuzzed_config_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        configure(Settings, [str(path)])
    except UserError as error:
        assert "any.py" in str(error)


def test_as_dict_is_plain():
    config = configure(Settings, ["--batch_size=3"])
    assert as_dict(config) == {**as_dict(Settings()), "batch_size": 3}
    assert "given" not in as_dict(config)


# ----------------------------------------------------------------------------- train.py's keys

NANOGPT = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "auto",  # these four are nccl, cuda, bfloat16 or float16, and True there
    "device": "auto",
    "dtype": "auto",
    "compile": "auto",
}


def test_train_keys_and_defaults_match_nanogpt():
    defaults = as_dict(TrainConfig())
    assert {key: defaults.get(key) for key in NANOGPT} == NANOGPT


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as left:
        configure(TrainConfig, ["--batch_size=3", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for key in key_types(TrainConfig):
        line = re.search(rf"^  --{key}=(\S*) +(\S.*)$", text, re.MULTILINE)
        assert line, f"{key} has no line with a comment"
        assert line[1] == str(getattr(TrainConfig, key))
    assert "python train.py config/train_shakespeare_char.py" in text  # how to use it


def test_help_lists_keys_of_a_resume(capsys):
    """Every key is in one of the two lists."""
    with pytest.raises(SystemExit):
        configure(TrainConfig, ["--help"])
    text = capsys.readouterr().out
    ours, runs = re.search(
        r"Keys that --init_from.*:\n(.*)\nKeys that it does take.*:\n(.*)", text, re.S
    ).groups()
    assert set(ours.split()) == {*TrainConfig.start_keys}
    assert sorted(ours.split() + runs.split()) == sorted(key_types(TrainConfig))


def test_config_files_in_the_repository_run(said):
    """Those of nanoGPT and ours: no key misspelt, no value of a wrong kind, nothing ignored."""
    folder = configurator.Path(configurator.__file__).parent / "config"
    files = sorted(folder.glob("*.py"))
    assert {"train_gpt2.py", "train_shakespeare_char.py"} <= {file.name for file in files}
    for file in files:
        configure(TrainConfig, [str(file)])
    assert said() == ""


def test_numpy_and_torch_scalars_are_checked():
    assert checked(np.float32(3.0), PositiveInt, "n", "") == 3
    with pytest.raises(UserError):
        checked(np.bool_(True), PositiveInt, "n", "")
    with pytest.raises(UserError):
        checked(torch.tensor(-1), PositiveInt, "n", "")


def test_renamed_keys_still_work(config_file):
    before = ["--keep_checkpoints=3", "--decay-share=0.5", "--dry_run_ranks=2"]
    config = configure(TrainConfig, before)
    assert (config.keep_last, config.decay_frac, config.dry_run_world_size) == (3, 0.5, 2)
    assert config.given == ("keep_last", "decay_frac", "dry_run_world_size")
    path = config_file("decay_share = decay_share / 2\nkeep_checkpoints = 3")
    config = configure(TrainConfig, [path])
    assert (config.decay_frac, config.keep_last) == (0.1, 3)


# ----------------------------------------------------------------------------- paths


def test_help_shows_headings_and_legal_values(capsys):
    with pytest.raises(SystemExit):
        configure(TrainConfig, ["--help"])
    text = capsys.readouterr().out
    headings = re.findall(r"^(\w[\w ]*):\n  --", text, re.MULTILINE)
    assert headings == ["run", "data", "model", "optimizer", "learning rate", "system"]
    assert re.search(r"^  --optimizer=adamw .*\[adamw\|muon\]$", text, re.MULTILINE)
    assert re.search(r"^  --dropout=0.0 .*\[float in \[0, 1\]\]$", text, re.MULTILINE)
    assert re.search(r"^  --eval_interval=2000 .*\[int >= 1\]$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["a.txt"], "--input=a.txt"),
        (["run"], "--init_from=resume --out_dir=run"),
        (["config/train_shakespear_char.py"], "did you mean config/train_shakespeare_char.py?"),
        (["train_gpt2"], "is not a config file (*.py); did you mean config/train_gpt2.py?"),
        (["--lr=1"], "did you mean learning_rate?"),
        (["--lrate=1"], "unknown key --lrate"),
    ],
)
def test_error_suggests_the_right_path_or_key(argv, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("import os")
    (tmp_path / "run").mkdir()
    (tmp_path / "config").symlink_to(Path(configurator.__file__).parent / "config")
    with pytest.raises(UserError) as caught:
        configure(TrainConfig, argv)
    assert hint in str(caught.value)


@pytest.mark.parametrize("Config", [SampleConfig, EvaluateConfig, ExportConfig])
def test_bare_path_names_a_run_or_checkpoint(Config, tmp_path):
    for name in ("out-x/last.pt", "theirs/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    assert configure(Config, [str(tmp_path / "out-x")]).out_dir == str(tmp_path / "out-x")
    assert configure(Config, [str(tmp_path / "theirs")]).init_from == str(tmp_path / "theirs")
    file = str(tmp_path / "out-x" / "last.pt")
    assert configure(Config, [file]).init_from == file
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint in it"):
        configure(Config, [str(tmp_path / "empty")])


def test_tilde_after_equals_is_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert configure(TrainConfig, ["--out_dir=~/out"]).out_dir == "/home/of/someone/out"
    assert configure(SampleConfig, ["--start=~/out"]).start == "~/out"  # a prompt


def test_config_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.py").write_text("\ufeffbatch_size = 3", encoding="utf-8")
    assert configure(TrainConfig, [str(tmp_path / "config.py")]).batch_size == 3


def test_config_file_that_exits_is_one_line(tmp_path):
    (tmp_path / "config.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="line 1: SystemExit"):
        configure(TrainConfig, [str(tmp_path / "config.py")])
