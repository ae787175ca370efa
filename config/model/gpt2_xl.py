# the size of gpt2-xl (1558M parameters), to combine with another config:
# python train.py config/train_gpt2.py config/model/gpt2_xl.py              # from scratch
# python train.py config/finetune_shakespeare.py config/model/gpt2_xl.py  # OpenAI's weights
# python bench.py config/model/gpt2_xl.py

n_layer = 48
n_head = 25
n_embd = 1600

_start = globals().get("init_from", "scratch")
if _start.startswith("gpt2"):
    init_from = "gpt2-xl"
