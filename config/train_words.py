# train a small model on the words of abstracts without stop words, in about a minute on a CPU:
# python data/words/prepare.py && python train.py config/train_words.py
# python sample.py --out_dir=out-words --start="text clustering" --max_words=5
# python sample.py --out_dir=out-words --start="text clustering" --top_next=10

# The model memorizes these 50 kB: the training perplexity falls below 1.6, the validation
# perplexity rises to thousands. --always_save_checkpoint=True keeps the memorizing model.

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
