# words of abstracts, common ones left out, with a small model, on a CPU in about a minute:
# python data/words/prepare.py && python train.py config/train_words.py
# python sample.py --out_dir=out-words --start="text clustering" --max_words=5
# python sample.py --out_dir=out-words --start="text clustering" --top_next=10

# 50 kB are learned by heart: the perplexity of the training text goes below 1.6, that of the text
# held out up to thousands. --always_save_checkpoint=True keeps the model that knows it by heart.

out_dir = "out-words"
eval_interval = 500
eval_iters = 20
log_interval = 100

always_save_checkpoint = False  # keep the best model, not the last

dataset = "words"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 8

n_layer = 4
n_head = 4
n_embd = 64
dropout = 0.1

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99

warmup_iters = 100
