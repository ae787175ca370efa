# the loss of OpenAI's gpt2-medium (350M parameters: 24 layers, 16 heads, 1024 wide),
# on data/openwebtext

batch_size = 8
eval_iters = 500  # many, for a close estimate
eval_only = True
wandb_log = False
init_from = "gpt2-medium"
