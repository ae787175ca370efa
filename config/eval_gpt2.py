# the loss of OpenAI's gpt2 (124M parameters: 12 layers, 12 heads, 768 wide),
# on data/openwebtext

batch_size = 8
eval_iters = 500  # many, for a close estimate
eval_only = True
wandb_log = False
init_from = "gpt2"
