"""The notebook runs, and its pictures show the model's numbers."""

import json

import pytest
import torch
from conftest import ROOT
from networks import VARIANTS, random_ids, random_model

from brisk.data.dataset import write_dataset
from brisk.data.tokenizer import CharTokenizer


@pytest.fixture
def tour(monkeypatch):
    """`tour(out_dir, prompt)`: the notebook executed on a run; its text output and pictures."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")

    def run(out_dir, prompt):
        monkeypatch.setenv("OUT_DIR", str(out_dir))
        monkeypatch.setenv("PROMPT", prompt)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        notebook = nbformat.read(ROOT / "notebooks" / "tour.ipynb", as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells)  # none are kept in git
        where = {"resources": {"metadata": {"path": str(ROOT / "notebooks")}}}
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", **where).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output.get("name") == "stderr"]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        return "".join(output.get("text", "") for output in outputs), pictures

    return run


def test_tour_runs(tour, train_tiny, tmp_path):
    train_tiny(tmp_path / "out")
    text, pictures = tour(tmp_path / "out", "Shall I comp")
    assert "logits: (1, 12, " in text
    assert text.count("--- temperature") == 3 and "step 100: loss 0.0" in text
    assert text.rstrip().endswith("Shall I comp")  # learned by heart
    assert len(pictures) == 3  # attention, next tokens, the run


def test_tour_runs_on_chinese(tour, train_tiny, tmp_path):
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 30
    splits = {"train": [poem], "val": [poem[:100]]}
    write_dataset(tmp_path / "data", CharTokenizer(sorted(set(poem))), splits, "a poem")
    train_tiny(tmp_path / "out", data_dir=tmp_path / "data")
    text, pictures = tour(tmp_path / "out", "床前明月光")
    assert "床" in text and len(pictures) == 3


@pytest.mark.parametrize("settings", [{}, *VARIANTS], ids=str)
def test_plotted_attention_matches_the_model(settings):
    """The weights times the values are the result of the kernel, in every block."""
    cells = json.loads((ROOT / "notebooks" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    [source] = ["".join(c["source"]) for c in cells if "attention_weights(" in "".join(c["source"])]
    names = {"torch": torch}
    exec(source[: source.index("LAYER, HEAD")], names)

    model, idx, kernel = random_model(**settings), random_ids(), []
    for block in model.transformer.h:  # c_proj multiplies the result, with the heads side by side
        block.attn.c_proj.register_forward_pre_hook(lambda _, inputs: kernel.append(inputs[0]))
        block.attn.c_attn.register_forward_hook(lambda _, inputs, y: kernel.append(y))
    model.predict(idx)
    n_head, kv_heads, head_dim = model.config.n_head, model.config.kv_heads, model.config.head_dim
    for layer in range(model.config.n_layer):
        weights = names["attention_weights"](model, idx, layer)
        qkv, expected = kernel[2 * layer : 2 * layer + 2]
        v = qkv[..., -kv_heads * head_dim :].unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
        v = v.repeat_interleave(n_head // kv_heads, dim=1)
        torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), expected)
