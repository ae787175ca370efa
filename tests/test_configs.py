"""The config files of the repository run in every script, and model sizes match GPT-2."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

import bench
import evaluate
import sample
import train
from configurator import configure
from model import GPT, GPTConfig

CONFIGS = sorted(str(path) for path in (ROOT / "config").rglob("*.py"))
PRESETS = {"gpt2": 124.4, "gpt2-medium": 354.8, "gpt2-large": 774.0, "gpt2-xl": 1557.6}


def preset(name):
    return f"config/model/{name.replace('-', '_')}.py"


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: Path(path).stem)
@pytest.mark.parametrize("script", [train, sample, evaluate, bench], ids=lambda s: s.__name__)
def test_every_config_runs_in_every_script(path, script, capsys):
    Config = next(value for name, value in vars(script).items() if name == f"{kind(script)}Config")
    configure(Config, [path])
    assert capsys.readouterr().err == ""  # no unknown names


def kind(script):
    return script.__name__.capitalize()


@pytest.mark.parametrize("name, millions", PRESETS.items())
def test_presets_match_gpt2_sizes(name, millions):
    config = configure(train.TrainConfig, ["config/train_gpt2.py", preset(name)])
    assert config.init_from == "scratch" and config.max_iters == 600000
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, **sizes))
    assert round(model.get_num_params(non_embedding=False) / 1e6, 1) == millions


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_the_weights_to_finetune(name):
    config = configure(train.TrainConfig, ["config/finetune_shakespeare.py", preset(name)])
    assert config.init_from == name and config.dataset == "shakespeare"
    config = configure(sample.SampleConfig, [preset(name)])
    assert config.init_from == "resume"


def test_preset_of_another_size_finetunes(tmp_path, main, settings):
    """With the same code as for GPT-2, and weights from a folder instead of the hub."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=64)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "hf")
    run = main(settings(tmp_path / "out", init_from=tmp_path / "hf", n_layer=None, n_head=None))
    assert run.checkpoint()["model_args"]["n_layer"] == 1
