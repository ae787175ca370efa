# train a character-level GPT with later methods than GPT-2, in two minutes on two CPU cores:
# python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char_fast.py
# Tuned on the last 5 % of the training text; benchmarks/ablation.py measures each part.

out_dir = "out-shakespeare-char-fast"
eval_interval = 200
eval_iters = 10
log_interval = 50

always_save_checkpoint = False  # keep the best model, not the last

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12  # 3072 tokens per step: the cost of n-gram tables and Muon is independent of it
block_size = 256

n_layer = 3
n_head = 3
n_embd = 96

position = "rotary"
qk_norm = True
mlp = "relu2"
tied = False
ngrams = 6  # 7.9M parameters in tables, without matrix products
ngram_dropout = 0.65

optimizer = "muon"
muon_learning_rate = 0.01
muon_momentum = 0.9
learning_rate = 3e-3
beta2 = 0.99

schedule = "wsd"
decay_frac = 0.4
warmup_iters = 20
max_iters = 1199
lr_decay_iters = 1200
min_lr = 0.0
