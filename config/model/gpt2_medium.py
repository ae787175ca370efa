# the size of gpt2-medium (355M parameters), to combine with another config:
# python train.py config/train_gpt2.py config/model/gpt2_medium.py              # from scratch
# python train.py config/finetune_shakespeare.py config/model/gpt2_medium.py  # OpenAI's weights
# python bench.py config/model/gpt2_medium.py

n_layer = 24
n_head = 16
n_embd = 1024

_start = globals().get("init_from", "scratch")
if _start.startswith("gpt2"):
    init_from = "gpt2-medium"
