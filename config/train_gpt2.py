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

# If the loss explodes: what small models say helps (benchmarks/RESULTS.md, Stability; at this size
# nobody has tried it). The network stays GPT-2's with these:
# learning_rate = 3e-4  # GPT-2's recipe trained well over 2 to 4 times in rates, no more
# min_lr = 3e-5
# warmup_iters = 10000  # five times as long: twice the rate was well on the mean
# on_spike = "rewind"  # where a number is none, on from the last checkpoint instead of an end
# And this does not; what is lost at too large a rate was half as much with it:
# qk_norm = True
