# the size of gpt2 (124M parameters), to combine with another config:
# python train.py config/train_gpt2.py config/model/gpt2.py              # from scratch
# python train.py config/finetune_shakespeare.py config/model/gpt2.py  # finetune OpenAI's weights
# python bench.py config/model/gpt2.py

n_layer = 12
n_head = 12
n_embd = 768

_start = globals().get("init_from", "scratch")
if _start.startswith("gpt2"):
    init_from = "gpt2"
