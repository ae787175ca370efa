"""Sampling by CUDA graphs gives the ids that it gives without them. Graphs are tapes here."""

import pytest
import torch
from conftest import exit_line
from networks import VARIANTS, random_model

from brisk.cpu.decode import Decoder
from brisk.cuda_graph import WARM_UP
from brisk.generation import decode_graph
from brisk.generation.decode_graph import positions_to_read

RAGGED = [[1, 2, 3], [5], [7] * 20]
EQUAL = [[1, 2, 3], [4, 5, 6]]
NEW = 60  # the block size is 24: windows move several times


@pytest.fixture(params=[True, False], ids=["decoder", "network"])
def buckets(request, tapes, monkeypatch):
    """Graphs of 8, 16 and 24 positions, of the CPU's decode step and of the network itself."""
    monkeypatch.setattr(decode_graph, "SHORTEST", 8)
    if not request.param:
        monkeypatch.setattr(Decoder, "of", lambda model: None)
    return tapes


def both(model, prompts, n=NEW, **options):
    """Texts without graphs, and with them."""
    plain, graphs = (
        [text.tolist() for text in model.generate(prompts, n, cuda_graph=on, **options)]
        for on in (False, True)
    )
    return plain, graphs


@pytest.mark.parametrize("prompts", [RAGGED, EQUAL, [[3]]], ids=["ragged", "equal", "one"])
@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_same_ids(buckets, variant, prompts):
    plain, graphs = both(random_model(**variant), prompts, seed=1, top_k=20)
    assert graphs == plain and len({*map(tuple, plain)}) == len(plain)
    assert 1 <= buckets.captures <= 3 and buckets.replays >= NEW - 3 * WARM_UP


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 5, "top_p": 0.5},
        {"vocab_size": 50, "suppress": (3, 4)},
        {"seed": [3, 4, 5], "samples": [7, 8, 9]},
        {"stop_ids": range(20)},
        {"stop_ids": [11]},
        {"on_token": lambda step, ids: step == 20},
        {"on_token": lambda step, ids: [step > 4, step > 9, step > 30]},
        {"exact_window": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_same_ids_with_options(buckets, options):
    plain, graphs = both(random_model(), RAGGED, **{"seed": 1, **options})
    assert graphs == plain


def test_finished_texts_keep_their_rows(buckets):
    """Without graphs they leave the batch, which would be another shape."""
    plain, graphs = both(random_model(), RAGGED, seed=1, stop_ids=range(30))
    assert graphs == plain and buckets.captures <= 3


def test_tensor_prompts(buckets):
    idx = torch.tensor(EQUAL)
    plain, graphs = (random_model().generate(idx, 9, seed=1, cuda_graph=on) for on in (False, True))
    assert graphs.equal(plain) and buckets.replays > 0


def test_several_settings_are_sampled_without(buckets):
    plain, graphs = both(random_model(), EQUAL, seed=1, temperature=[0.5, 1.0])
    assert graphs == plain and buckets.captures == 0


def test_other_devices_are_sampled_without():
    plain, graphs = both(random_model(), EQUAL, seed=1)
    assert graphs == plain


def test_model_in_float64(buckets):
    plain, graphs = both(random_model().double(), RAGGED, seed=1)
    assert graphs == plain


@pytest.mark.parametrize(
    "held, size, read", [(1, 1024, 256), (256, 1024, 256), (257, 1024, 512), (9, 24, 24)]
)
def test_positions_to_read(held, size, read):
    assert positions_to_read(held, size) == read


def test_sample_refuses_other_devices(train_tiny, tmp_path):
    import sample
    from configurator import configure

    train_tiny(tmp_path / "out", max_iters=1)
    argv = [f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--cuda_graph=True"]
    assert "--cuda_graph needs a GPU" in exit_line(
        sample.main, configure(sample.SampleConfig, argv)
    )
