# generate positive or negative Chinese film reviews on request, in minutes on a CPU:
# python data/reviews/prepare.py --label_prompt --balance --data_dir=data/asked
# python train.py config/train_reviews_asked_cpu.py
# python sample.py --out_dir=out-asked --start=差评：

out_dir = "out-asked"
eval_interval = 100
eval_iters = 8
log_interval = 50

always_save_checkpoint = False  # keep the best model, not the last

dataset = "asked"
gradient_accumulation_steps = 1
batch_size = 48
block_size = 64
rows = "documents"  # so that the label is always in the context

n_layer = 3
n_head = 6
n_embd = 192
dropout = 0.2

learning_rate = 2e-3
weight_decay = 0.1
max_iters = 700  # after 1400, 9 of 10 negative reviews are copies of the training data
lr_decay_iters = 700
min_lr = 2e-4
beta2 = 0.99

warmup_iters = 100
