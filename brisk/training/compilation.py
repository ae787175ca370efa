"""torch.compile for the regions of a model."""

import torch

from brisk.device import first_line
from brisk.training.loss import CHUNK, fusible_loss_and_gradient


def compile_model(model, tokens, say, blocks_only=False):
    """Compile a `GPT` in place, for training on micro-batches of `tokens` tokens. The names of its
    parameters do not change.

    If the logits of a micro-batch fit into one chunk of the loss, the forward pass is one graph:
    such a model is limited by the host, and one graph costs the host least. Otherwise the blocks
    (one graph for all of them), the embeddings, the last norm and the loss of a chunk are compiled
    separately. FSDP and activation checkpointing wrap blocks, so with `blocks_only` only these are
    compiled.

    A later compilation of another shape may still fail, for example because a disk is full. Then
    all regions run uncompiled, and `say` is called once with a line.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.optimize_ddp = False  # would split the blocks' graphs at the edges of DDP's buckets
    functorch.force_non_lazy_backward_lowering = True  # a failure is raised in the forward pass
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
                    say(f"compilation failed, continuing uncompiled: {first_line(error)}")
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
