# evaluate OpenAI's gpt2-large (774M parameters: n_layer=36, n_head=20, n_embd=1280)
# on data/openwebtext

batch_size = 8
eval_iters = 500  # more than during training, for a precise estimate
eval_only = True
wandb_log = False
init_from = "gpt2-large"
