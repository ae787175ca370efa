# evaluate OpenAI's gpt2-medium (355M parameters: n_layer=24, n_head=16, n_embd=1024)
# on data/openwebtext

batch_size = 8
eval_iters = 500  # more than during training, for a precise estimate
eval_only = True
wandb_log = False
init_from = "gpt2-medium"
