# the loss of OpenAI's gpt2-large (774M parameters: 36 layers, 20 heads, 1280 wide),
# on data/openwebtext

batch_size = 8
eval_iters = 500  # many, for a close estimate
eval_only = True
wandb_log = False
init_from = "gpt2-large"
