# learn to add two-digit numbers, in about a minute on a CPU:
# python data/addition/prepare.py && python train.py config/train_addition.py
# python evaluate.py --out_dir=out-addition --task=addition
# python sample.py --out_dir=out-addition --start="27+58="

out_dir = "out-addition"
eval_interval = 250
eval_iters = 20
log_interval = 50

always_save_checkpoint = False  # keep the best model, not the last

dataset = "addition"
gradient_accumulation_steps = 1
batch_size = 128
block_size = 12  # a sum of two-digit numbers with end-of-text tokens
rows = "documents"

n_layer = 2
n_head = 4
n_embd = 128

learning_rate = 2e-3
max_iters = 3000
lr_decay_iters = 3000
min_lr = 1e-4
beta2 = 0.99

warmup_iters = 100
