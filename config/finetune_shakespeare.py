# finetune GPT-2 on Shakespeare; with less memory use a smaller model: --init_from=gpt2
# python data/shakespeare/prepare.py && python train.py config/finetune_shakespeare.py

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"  # the largest GPT-2

always_save_checkpoint = False  # keep the best model, not the last

# 1 sequence * 32 micro-batches * 1024 tokens = 32,768 tokens per step;
# an epoch (301,966 tokens) is about 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
