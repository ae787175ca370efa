# GPT-2 finetuned on a text, with a small GPU or none:
# python data/shakespeare/prepare.py && python train.py config/finetune_gpt2.py
# The rates, epochs and dropout with which GPT-1 was finetuned (Radford et al. 2018, section 4.1).

out_dir = "out-finetuned"
eval_interval = 20
eval_iters = 40
log_interval = 5

dataset = "shakespeare"
init_from = "gpt2"  # gpt2-medium, gpt2-large and gpt2-xl are better and larger

always_save_checkpoint = False  # keep the best model: a small text is soon known by heart

# 32 sequences in a step, one at a time
batch_size = 1
gradient_accumulation_steps = 32
max_epochs = 3

dropout = 0.1
weight_decay = 0.01
learning_rate = 6.25e-5
beta2 = 0.999
schedule = "wsd"  # a line down from the warm-up to the end
decay_frac = 1.0
warmup_iters = 5
min_lr = 0.0

# Less memory: blocks are computed again in the backward pass, for a third more time, and
# --freeze_layers=n keeps the embeddings and the first n blocks as they are, without gradients
# and moments.
activation_checkpointing = True
