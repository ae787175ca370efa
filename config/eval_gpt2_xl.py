# evaluate OpenAI's gpt2-xl (1558M parameters: n_layer=48, n_head=25, n_embd=1600)
# on data/openwebtext

batch_size = 8
eval_iters = 500  # more than during training, for a precise estimate
eval_only = True
wandb_log = False
init_from = "gpt2-xl"
