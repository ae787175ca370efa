# train a modern GPT of GPT-2's size on FineWeb-Edu, on 8 GPUs (not yet trained to the end):
# python data/fineweb_edu/prepare.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py

out_dir = "out-gpt2-modern"
wandb_log = False
wandb_project = "gpt2-modern"
wandb_run_name = "gpt2-modern-124M"

dataset = "fineweb_edu"
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8  # 0.5M tokens per step
eval_interval = 500
eval_iters = 100
log_interval = 10

position = "rotary"
norm = "rms"
qk_norm = True
mlp = "swiglu"
tied = False  # 39M more parameters, at the same compute
zero_init = True

# with these parts and Muon, small models train well over a range of learning rates five times as
# wide as GPT-2's (benchmarks/RESULTS.md, Stability)
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 3e-3  # AdamW's, for embeddings, head and vectors
weight_decay = 0.1

schedule = "wsd"
decay_frac = 0.4
warmup_iters = 100
max_iters = 20000  # 10 billion tokens
lr_decay_iters = 20000
min_lr = 0.0
