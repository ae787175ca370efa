# What came after GPT-2, in place of its parts; a function that is Qwen3's. For any other config:
# python train.py config/model/modern.py config/train_shakespeare_char.py
# python bench.py config/model/modern.py
# A config or key after it wins; add --n_kv_head=2 or --tied=False as you like. Zeros and a tied
# head together begin above the loss of a guess, as each token foretells itself: with 768 channels
# and GPT-2's vocabulary at about 15 nats instead of 10.8.

position = "rotary"
norm = "rms"
qk_norm = True
mlp = "swiglu"
bias = False
zero_init = True
