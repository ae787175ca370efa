"""The notebook runs, and its pictures show the model's numbers."""

import json
import re

import pytest
import torch
from conftest import ROOT, TEXT
from networks import VARIANTS, random_ids, random_model

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 30


@pytest.fixture
def tour(monkeypatch, tmp_path):
    """`tour(text)`: execute the notebook with a short training. Returns its output and pictures."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tokenizers")

    def run(text):
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        monkeypatch.setenv("TEXT_FILE", str(tmp_path / "text.txt"))
        monkeypatch.setenv("STEPS", "40")
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


@pytest.mark.parametrize("text", [TEXT, POEM], ids=["english", "chinese"])
def test_tour_runs(tour, text):
    printed, pictures = tour(text)
    V = len(set(text))
    assert f"{V} tokens" in printed and f"(1, 24, {V})" in printed
    uniform, bigram = re.findall(r"(?:uniform|bigram): +([\d.]+), as among", printed)
    validation = re.findall(r"validation loss ([\d.]+)", printed)
    assert float(bigram) < float(uniform) and float(validation[-1]) < float(uniform)
    assert printed.count("--- temperature") == 3 and printed.count("next is") == 5
    assert len(pictures) == 8


@pytest.mark.parametrize("settings", [{}, *VARIANTS], ids=str)
def test_plotted_attention_matches_the_model(settings):
    """The weights times the values are the result of the kernel, in every block."""
    cells = json.loads((ROOT / "notebooks" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    [source] = [source for source in sources if "def attention_weights(" in source]
    names = {"torch": torch}
    exec(source, names)

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
