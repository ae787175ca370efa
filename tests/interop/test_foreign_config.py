"""Any changed config of GPT-2 or Qwen3 gives transformers' logits or one line."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_huggingface import random_gpt2, random_qwen3

from brisk.errors import UserError
from brisk.interop import gpt2, qwen3
from model import GPT

transformers = pytest.importorskip("transformers")

FAMILIES = {"gpt2": (gpt2, random_gpt2), "qwen3": (qwen3, random_qwen3)}
MISSING = "(missing)"
WRONG = [MISSING, "x", "", "2", [], [1], [None], {}, {"a": 1}, True, False, None, 0, -1, 0.5, 32.0]
WRONG += [math.nan, math.inf, -math.inf, 2**31, 2**63, 10**400, 1e300]
SIZES = [1, 2, 3, 4, 5, 8, 16, 32, 40, 48, 64, 100, 10_000, 2**31 - 1]
THETAS = [1, 10000, 1e6, 1e-6, 1e-7, 0, -1, 5e-324, 1e31, 10**400, True, None, "1e6", [1], math.nan]
ROPES = [None, {}, {"rope_type": "default"}, {"type": "default"}, {"type": "linear", "factor": 2.0}]
ROPES += [{"rope_type": kind, "factor": 2.0} for kind in ("yarn", "dynamic", "default", [1], None)]
ROPES += [{"rope_theta": theta} for theta in THETAS]
ROPES += [{"type": "default", "rope_type": "yarn", "factor": 2.0}, {"partial_rotary_factor": 0.5}]
ROPES += [{"full_attention": {"rope_type": kind, "rope_theta": 5.0}} for kind in ("x", "default")]
VALUES = {"rope_theta": THETAS, "rope_parameters": ROPES, "rope_scaling": ROPES}
VALUES |= {"layer_types": [["full_attention"], ["full_attention"] * 2, ["sliding_attention"] * 2]}
IDX = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{model_type: (folder, config)} of a small model of each family."""
    folders = {}
    for name, (_, make) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        make().save_pretrained(folder)
        folders[name] = folder, json.loads((folder / "config.json").read_text())
    return folders


def keys(name):
    config = FAMILIES[name][0].CONFIG
    return ["model_type", *config, *(key.alias for key in config.values() if key.alias)]


def theirs(folder, idx):
    """transformers' logits, or None if it does not load the directory unchanged."""
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        return None if any(told.values()) else model.eval()(idx).logits.detach()
    except Exception:
        return None


def outcome(saved, name, changes):
    """Whether the changed config is refused. If not, its logits must match transformers'."""
    folder, right = saved[name]
    config = {k: v for k, v in {**right, **changes}.items() if v != MISSING}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = GPT.from_pretrained(folder)
    except UserError as error:
        assert str(folder) in str(error)
        return "refused"
    idx = IDX[:, : model.config.block_size]
    expected = theirs(folder, idx)
    assert expected is not None, "taken here only"
    with torch.no_grad():
        torch.testing.assert_close(model.predict(idx), expected, rtol=1e-4, atol=1e-4)
    return "equal"


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_key_is_supported_or_refused(saved, name):
    found = {"refused": 0, "equal": 0}
    for key in keys(name):
        for value in [*WRONG, *SIZES, *VALUES.get(key, [])]:
            found[outcome(saved, name, {key: value})] += 1
    assert found["refused"] > 500 and found["equal"] > 20


def test_old_and_new_rope_settings_together(saved):
    found = [
        outcome(saved, "qwen3", {"rope_parameters": new, "rope_scaling": old, "rope_theta": 7.0})
        for new in ROPES
        for old in ROPES[::2]
    ]
    assert found.count("equal") > 20


@settings(max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_changed_keys_are_supported_or_refused(saved, data):
    name = data.draw(st.sampled_from(list(FAMILIES)))
    json_value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )
    likely = st.sampled_from([*WRONG, *SIZES])
    changes = st.dictionaries(st.sampled_from(keys(name)), likely | json_value, max_size=4)
    outcome(saved, name, data.draw(changes))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"gpt2"', "{}", '{"model_type": ["gpt2"]}'])
def test_config_that_is_not_a_model(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        GPT.from_pretrained(tmp_path)
