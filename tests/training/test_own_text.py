"""train.py --input: a run on the user's text."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import train
from brisk.checkpoint import load_checkpoint
from brisk.training.own_text import choose_settings
from configurator import configure
from model import GPTConfig

SMALL = ["--minutes=0.02", "--n_layer=1", "--n_head=1", "--n_embd=16", "--device=cpu"]


@pytest.fixture
def own_text(text, tmp_path, monkeypatch):
    """A text in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(3 * text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run_on(main):
    """A run of train.py that writes to `out_dir`."""

    def run(out_dir, *argv):
        result = main([*argv])
        result.out_dir = Path(out_dir)
        return result

    return run


def test_one_command_trains_on_a_text(own_text, run_on):
    run = run_on("out-my", "--input=my.txt", *SMALL)
    assert (own_text / "data" / "my" / "train.bin").exists()
    saved = load_checkpoint(own_text / "out-my" / "last.pt")
    config = saved["config"]
    assert (config["n_embd"], config["optimizer"], config["data_dir"]) == (16, "muon", "data/my")
    assert config["max_iters"] == saved["iter_num"] - 1
    assert {"max_iters", "data_dir", "block_size"} <= {*saved["given"]}

    command = re.search(r"with every setting explicit: python train.py (.*)", run.console)[1]
    again = run_on("again", *shlex.split(command), "--out_dir=again")
    assert again.series("val_loss") == run.series("val_loss")

    second = run_on("out-my", "--input=my.txt", *SMALL[1:], "--init_from=resume")
    assert "using it" in second.console and "at its end" in second.console


def test_run_ends_with_a_sample(own_text, script):
    result = script("train.py", "--input=my.txt", *SMALL, cwd=own_text)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("---------------")
    assert len(result.stdout.split("python sample.py --out_dir=out-my")[1]) > 200


def test_given_settings_are_kept(own_text, run_on):
    run = run_on("o", "--input=my.txt", *SMALL[1:], "--max_iters=3", "--out_dir=o")
    assert max(run.series("loss")) == 3 and "for 5 minutes" not in run.console


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [20, 1000, 10**5, 10**6, 10**7, 10**8, 10**10])
def test_network_for_every_text_size(tokens, device_type):
    values = choose_settings(tokens, shortest=max(2, tokens // 10), device_type=device_type)
    fields = {key: values[key] for key in values if key in GPTConfig.__dataclass_fields__}
    assert GPTConfig(**fields).block_size < max(2, tokens // 10)
    argv = [f"--{key}={value}" for key, value in values.items()]
    configure(train.TrainConfig, argv)


def test_network_grows_with_the_text():
    sizes = []
    for tokens in (10**4, 10**5, 10**6, 10**7, 10**8, 10**9):
        values = choose_settings(tokens, tokens // 10, "cpu")
        sizes.append(values["n_layer"] * values["n_embd"] ** 2)
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("content", [b"", b"a", b"ab"])
def test_too_short_text_is_one_line(own_text, content):
    (own_text / "my.txt").write_bytes(content)
    with pytest.raises(train.UserError) as caught:
        train.main(configure(train.TrainConfig, ["--input=my.txt", *SMALL]))
    assert "\n" not in str(caught.value)
    assert not (own_text / "out-my").exists()
    assert torch.is_grad_enabled()
