# the characters of Shakespeare on a CPU with what came after GPT-2, in two minutes on two cores:
# python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char_fast.py
# Chosen on the last twentieth of the training text; benchmarks/ablation.py takes its parts back.

out_dir = "out-shakespeare-char-fast"
eval_interval = 100
eval_iters = 10
log_interval = 50

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16  # 2048 tokens in a step, so that Muon takes a sixth of it
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

position = "rotary"
qk_norm = True
mlp = "relu2"
tied = False

optimizer = "muon"
muon_learning_rate = 0.01
muon_momentum = 0.9
learning_rate = 3e-3
beta2 = 0.99

schedule = "wsd"
decay_share = 0.4
warmup_iters = 20
max_iters = 1199
lr_decay_iters = 1200
min_lr = 0.0
