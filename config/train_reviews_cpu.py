# train a small model on Chinese film reviews, in minutes on a CPU:
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
# Windows across the ends of reviews: short reviews need no padding, and each review is seen at many
# positions of a window, which acts as data augmentation.
rows = "windows"

n_layer = 2
n_head = 4
n_embd = 192
dropout = 0.2

learning_rate = 2e-3
weight_decay = 4.0  # large, as the text is short
max_iters = 1500
lr_decay_iters = 1500
min_lr = 2e-4
beta2 = 0.99

warmup_iters = 100
