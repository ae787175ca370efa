# train GPT-2 XL (1.5B) on OpenWebText with FSDP, on 1 node of 8 GPUs with 80 GB (not yet trained):
# python data/openwebtext/prepare.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
# To print the memory it needs on each GPU, on any machine with the data:
# python train.py config/train_gpt2_xl.py --dry_run=True --dry_run_world_size=8 --dtype=bfloat16

out_dir = "out-gpt2-xl"
wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-xl"

# Radford et al. 2019, table 2; heads of 64 channels
n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024

# 16 sequences * 1024 tokens * 4 micro-batches * 8 GPUs = 524,288 tokens per step
batch_size = 16
gradient_accumulation_steps = 4 * 8

# GPT-2's paper does not give learning rates. These are GPT-3's (Brown et al. 2020): table 2.1 for
# the rate of the nearest size (1.3B, batches of 1M tokens); appendix B for Adam's betas, gradient
# clipping, weight decay, the warm-up over 375M tokens and the cosine decay to a tenth
learning_rate = 2e-4
min_lr = 2e-5
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
weight_decay = 1e-1
warmup_iters = 715

# about 300 billion tokens in total, as for GPT-3
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

parallel = "fsdp"
activation_checkpointing = True
