# evaluate OpenAI's gpt2 (124M parameters: n_layer=12, n_head=12, n_embd=768)
# on data/openwebtext

batch_size = 8
eval_iters = 500  # more than during training, for a precise estimate
eval_only = True
wandb_log = False
init_from = "gpt2"
