# the size of gpt2-large (774M parameters), to combine with another config:
# python train.py config/train_gpt2.py config/model/gpt2_large.py              # from scratch
# python train.py config/finetune_shakespeare.py config/model/gpt2_large.py  # OpenAI's weights
# python bench.py config/model/gpt2_large.py

n_layer = 36
n_head = 20
n_embd = 1280

_start = globals().get("init_from", "scratch")
if _start.startswith("gpt2"):
    init_from = "gpt2-large"
