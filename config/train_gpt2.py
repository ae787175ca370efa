# GPT-2 (124M) on OpenWebText, to a validation loss of about 2.85 on a node of 8 A100s:
# python data/openwebtext/prepare.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# about half a million tokens in a step: 12 sequences * 1024 tokens * 5 micro-batches * 8 GPUs
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
