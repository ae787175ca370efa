# the architecture of Qwen3, to combine with another config:
# python train.py config/model/modern.py config/train_shakespeare_char.py
# python bench.py config/model/modern.py
# Later configs and keys override it, such as --n_kv_head=2 or --tied=False. With zero_init and a
# tied head, each token initially predicts itself, so the initial loss is above that of a uniform
# guess: about 15 nats instead of 10.8, with 768 channels and GPT-2's vocabulary.

position = "rotary"
norm = "rms"
qk_norm = True
mlp = "swiglu"
bias = False
zero_init = True
