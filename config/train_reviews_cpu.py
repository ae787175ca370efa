# Chinese film reviews, one after another, with a small model, on a CPU in minutes:
# python data/reviews/prepare.py && python train.py config/train_reviews_cpu.py
# python sample.py --out_dir=out-reviews-cpu --start=好看

out_dir = "out-reviews-cpu"
eval_interval = 250
eval_iters = 8
log_interval = 50

always_save_checkpoint = False  # keep the best model, not the last

dataset = "reviews"
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64
# Windows over reviews and their ends: no room is lost to short ones, and each is seen at every
# place in a window, which makes up for there being so few.
rows = "windows"

n_layer = 2
n_head = 4
n_embd = 192
dropout = 0.2

learning_rate = 2e-3
weight_decay = 4.0  # much, as for any text this short
max_iters = 1500
lr_decay_iters = 1500
min_lr = 2e-4
beta2 = 0.99

warmup_iters = 100
