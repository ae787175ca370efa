# the size of gpt-numo, for words or other small data sets on a CPU:
# python train.py config/train_words.py

n_layer = 4
n_head = 4
n_embd = 64
block_size = 8
