# train 9M parameters on Chinese film reviews, on a GPU:
# python data/reviews/prepare.py && python train.py config/train_reviews.py
# python sample.py --out_dir=out-reviews --start=好看

out_dir = "out-reviews"
eval_interval = 100
eval_iters = 20
log_interval = 10

always_save_checkpoint = False  # the model overfits on a small text: keep the best one

dataset = "reviews"
gradient_accumulation_steps = 1
batch_size = 128
block_size = 64
rows = "windows"  # across the ends of reviews

n_layer = 12
n_head = 12
n_embd = 252
dropout = 0.3

learning_rate = 6e-4
weight_decay = 1.0  # large, as the text is short
max_iters = 1500
lr_decay_iters = 1500
min_lr = 6e-5
beta2 = 0.99

warmup_iters = 100
