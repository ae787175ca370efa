# the loss of OpenAI's gpt2-xl (1558M parameters: 48 layers, 25 heads, 1600 wide),
# on data/openwebtext

batch_size = 8
eval_iters = 500  # many, for a close estimate
eval_only = True
wandb_log = False
init_from = "gpt2-xl"
