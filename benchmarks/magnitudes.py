"""Print the largest activations of a model along a run, for comparison with float16's limit.

    $ python train.py config/train_shakespeare_char_cpu.py --eval_interval=250 --keep_last=12
    $ python benchmarks/magnitudes.py --out_dir=out-shakespeare-char-cpu

For each checkpoint `step-*.pt` of the run, the largest absolute value over some windows of val.bin:
of attention logits and of the outputs of the blocks' linear layers (both float16 under autocast),
of the residual stream (float32) and of the output logits. float16 overflows above 65,504. Attention
logits in the tens saturate the softmax, whose gradient then vanishes (Dehghani et al. 2023, Scaling
Vision Transformers to 22 Billion Parameters, section 2).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.checkpoint import load_checkpoint
from brisk.data.dataset import read_meta
from brisk.data.loader import TokenFile, find_data_dir
from brisk.errors import UserError, one_line_errors
from configurator import PositiveInt, configure
from model import GPT

COLUMNS = ("attention", "linear", "residual", "logits")


@dataclass(frozen=True)
class MagnitudesConfig:
    out_dir: str = "out"  # folder of a run with --keep_last
    data_dir: str = ""  # folder of the token files; if empty, the training data set
    windows: PositiveInt = 64  # windows of val.bin to read


class Watch(TorchFunctionMode):
    """A context that records the largest absolute attention logit."""

    def __init__(self):
        super().__init__()
        self.largest = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]  # (B, n_head, T, head_dim), (B, n_kv_head, T, head_dim)
            k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
            logits = (q @ k.mT).tril() / q.size(-1) ** 0.5
            self.largest = max(self.largest, logits.abs().max().item())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def magnitudes(model, idx):
    """Return {column: largest absolute value} for token ids (B, T)."""
    largest = dict.fromkeys(COLUMNS, 0.0)

    def keep(name):
        def hook(module, inputs, output):
            largest[name] = max(largest[name], output.abs().max().item())

        return hook

    hooks = [block.register_forward_hook(keep("residual")) for block in model.transformer.h]
    linear = [m for m in model.transformer.h.modules() if isinstance(m, torch.nn.Linear)]
    hooks += [module.register_forward_hook(keep("linear")) for module in linear]
    with Watch() as watch:
        logits = model.predict(idx)
    for hook in hooks:
        hook.remove()
    return largest | {"attention": watch.largest, "logits": logits.abs().max().item()}


def main(config):
    paths = sorted(Path(config.out_dir).glob("step-*.pt"))
    if not paths:
        raise UserError(f"{config.out_dir} has no step-*.pt; train with --keep_last=20")
    print(f"{'step':>8}" + "".join(f"{name:>12}" for name in COLUMNS))
    for path in paths:
        checkpoint = load_checkpoint(path)
        trained_with = checkpoint["config"]
        data_dir = config.data_dir or trained_with.get("data_dir", "")
        data_dir = find_data_dir(data_dir, trained_with.get("dataset", ""))
        meta, model = read_meta(data_dir), GPT.from_checkpoint(checkpoint)
        sizes = (model.config.block_size, model.config.vocab_size)
        file = TokenFile(data_dir / "val.bin", *sizes, meta["dtype"] if meta else "uint16")
        found = magnitudes(model, file.batch(0, config.windows)[0].long())
        figures = "".join(f"{found[name]:12.4g}" for name in COLUMNS)
        print(f"{checkpoint['iter_num']:8d}{figures}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(MagnitudesConfig, sys.argv[1:]))
