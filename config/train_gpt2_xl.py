# GPT-2 XL (1.5B) on OpenWebText under FSDP, on a node of 8 GPUs of 80 GB; not yet trained by us:
# python data/openwebtext/prepare.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
# What it would take of each, told by any machine that has the data:
# python train.py config/train_gpt2_xl.py --dry_run=True --dry_run_world_size=8 --dtype=bfloat16

out_dir = "out-gpt2-xl"
wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-xl"

# Radford et al. 2019, table 2: 48 layers of 1600; heads of 64 channels
n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024

# about half a million tokens in a step: 16 sequences * 1024 tokens * 4 micro-batches * 8 GPUs
batch_size = 16
gradient_accumulation_steps = 4 * 8

# Radford et al. do not print their rates. Brown et al. 2020 (GPT-3): table 2.1 has 2e-4 for 1.3B
# parameters, the nearest in size, in batches of 1M tokens; appendix B has Adam's betas, the norm of
# 1.0, the decay of 0.1, a warm-up over 375M tokens and a cosine down to a tenth
learning_rate = 2e-4
min_lr = 2e-5
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
weight_decay = 1e-1
warmup_iters = 715

# 300 billion tokens in all, as many as GPT-3 saw
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

parallel = "fsdp"
activation_checkpointing = True
