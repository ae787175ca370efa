# train on Shakespeare with GPT-2's tokenizer, from scratch, in about two minutes on a CPU:
# python data/shakespeare/prepare.py && python train.py config/train_shakespeare.py

out_dir = "out-shakespeare-bpe"
eval_interval = 50
eval_iters = 10
log_interval = 10

always_save_checkpoint = False

dataset = "shakespeare"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 2e-3
max_iters = 300
lr_decay_iters = 300
min_lr = 2e-4
beta2 = 0.99

warmup_iters = 20
