# finetune GPT-2 with little memory, on a small GPU or a CPU:
# python data/shakespeare/prepare.py && python train.py config/finetune_gpt2.py
# Learning rate, epochs and dropout as for finetuning GPT-1 (Radford et al. 2018, section 4.1).

out_dir = "out-finetuned"
eval_interval = 20
eval_iters = 40
log_interval = 5

dataset = "shakespeare"
init_from = "gpt2"  # gpt2-medium, gpt2-large and gpt2-xl are better and larger

always_save_checkpoint = False  # the model overfits on a small text: keep the best one

# 32 sequences per step, one at a time
batch_size = 1
gradient_accumulation_steps = 32
max_epochs = 3

dropout = 0.1
weight_decay = 0.01
learning_rate = 6.25e-5
beta2 = 0.999
schedule = "wsd"  # with decay_frac = 1: linear decay from the warm-up to the end
decay_frac = 1.0
warmup_iters = 5
min_lr = 0.0

# Less memory: blocks are recomputed in the backward pass, which takes a third more time.
# --freeze_layers=n saves more: the embeddings and the first n blocks are not trained and need no
# gradients or optimizer state.
activation_checkpointing = True
