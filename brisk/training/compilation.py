"""torch.compile applied to a model, region by region."""

import torch

from brisk.device import first_line
from brisk.training.loss import CHUNK, fusible_loss_and_gradient


def compile_model(model, tokens, say, blocks_only=False):
    """Compile a `GPT` in place, for training on micro-batches of `tokens` tokens. Names of weights
    stay as they are.

    Where the logits of a micro-batch fit into one chunk of the loss, the forward pass is one graph:
    such a model is limited by the host, which this costs least. Otherwise each block is compiled,
    one graph for all of them, and so are the embeddings, the last norm and the loss of a chunk.
    With `blocks_only`, for FSDP and activation checkpointing, which act on blocks, those alone are.

    A later compilation, of another shape, may still fail, by a full disk for instance. Then `say`
    is called with a line, once, and all regions run uncompiled.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.optimize_ddp = False  # it would cut every block in two, at the edges of DDP's buckets
    if hasattr(functorch, "force_non_lazy_backward_lowering"):  # PyTorch 2.9
        functorch.force_non_lazy_backward_lowering = True  # it fails in the forward pass, or not
    compiling = True

    def compiled_or_not(forward):
        compiled = torch.compile(forward)

        def call(*inputs, **options):
            nonlocal compiling
            if compiling:
                try:
                    return compiled(*inputs, **options)
                except torch._dynamo.exc.TorchDynamoException as error:
                    compiling = False
                    say(f"compiling failed, going on without it: {first_line(error)}")
            return forward(*inputs, **options)

        return call

    if not blocks_only and tokens * model.config.vocab_size <= CHUNK:
        model.forward = compiled_or_not(model.forward)
        return
    for block in model.transformer.h:
        block.forward = compiled_or_not(block.forward)
    if not blocks_only:
        model.embed = compiled_or_not(model.embed)
        model.transformer.ln_f.forward = compiled_or_not(model.transformer.ln_f.forward)
        model.loss_kernel = compiled_or_not(fusible_loss_and_gradient)
