# the source of Python's own standard library, on a CPU in about two minutes on two cores:
# python data/python_source/prepare.py && python train.py config/train_python_source.py

out_dir = "out-python-source"
eval_interval = 500
eval_iters = 20
log_interval = 100

dataset = "python_source"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # about 200 characters

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3
max_iters = 4000
lr_decay_iters = 4000
min_lr = 1e-4
beta2 = 0.99

warmup_iters = 100
