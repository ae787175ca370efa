# train GPT-2 (124M) on OpenWebText to a validation loss of about 2.85, on 8 A100 GPUs:
# python data/openwebtext/prepare.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences * 1024 tokens * 5 micro-batches * 8 GPUs = 491,520 tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# about 300 billion tokens in total
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1

# If the loss diverges, these helped small models (benchmarks/RESULTS.md, Stability; not tested at
# this size). They do not change the architecture:
# learning_rate = 3e-4  # this recipe trained well only within a factor of 2 to 4
# min_lr = 3e-5
# warmup_iters = 10000  # five times as long allowed about twice the learning rate
# on_spike = "rewind"  # at a non-finite loss, return to the last checkpoint instead of stopping
# This one changes it, and halved the damage of too large a learning rate:
# qk_norm = True
