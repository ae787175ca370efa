"""A model and its tokenizer in one GGUF file, as llama.cpp and what builds on it read them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names of tensors and keys
are the `gguf` package's, which llama.cpp's own converter takes them from. All of it is float32;
`llama-quantize` makes smaller files of one. llama.cpp computes GELU by its tanh form and, on a
CPU, from a table in half precision: logits of a GPT-2 differ by about 1e-3 there.
"""

import logging

from brisk.errors import UserError
from brisk.interop.gpt2 import transpose_conv1d
from brisk.interop.tokenizer_json import as_letters, check_exact

WRITER = "briskgpt.export"  # a key of ours, which others pass over


def write_gguf(path, theirs, weights, tokenizer):
    """Write a model, as `huggingface.to_hugging_face` returns it, to the new file `path`.

    Raises `UserError` where the `gguf` package is missing, or the tokenizer cannot be carried.
    """
    gguf = the_package()
    if theirs["model_type"] == "qwen3":
        arch, sizes = gguf.MODEL_ARCH.QWEN3, qwen3_sizes(theirs)
    else:
        arch, sizes = gguf.MODEL_ARCH.GPT2, gpt2_sizes(theirs)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_string(WRITER, "1")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    add_tokenizer(writer, gguf, tokenizer)
    names = gguf.get_tensor_name_map(arch, sizes["block_count"])
    for name, weight in weights.items():
        if theirs["model_type"] == "gpt2":
            weight = transpose_conv1d(name, weight)
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(short, weight.contiguous().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gpt2_sizes(theirs):
    """Sizes of a GPT-2 by the names of the writer's methods."""
    return {
        "block_count": theirs["n_layer"],
        "context_length": theirs["n_positions"],
        "embedding_length": theirs["n_embd"],
        "feed_forward_length": theirs["n_inner"] or 4 * theirs["n_embd"],
        "head_count": theirs["n_head"],
        "layer_norm_eps": theirs["layer_norm_epsilon"],
    }


def qwen3_sizes(theirs):
    return {
        "block_count": theirs["num_hidden_layers"],
        "context_length": theirs["max_position_embeddings"],
        "embedding_length": theirs["hidden_size"],
        "feed_forward_length": theirs["intermediate_size"],
        "head_count": theirs["num_attention_heads"],
        "head_count_kv": theirs["num_key_value_heads"],
        "key_length": theirs["head_dim"],
        "value_length": theirs["head_dim"],
        "layer_norm_rms_eps": theirs["rms_norm_eps"],
        "rope_freq_base": theirs["rope_theta"],
    }


def add_tokenizer(writer, gguf, tokenizer):
    """All of ours are byte-pair encodings there: bytes are one without merges, and characters one
    whose merges make each of them of its bytes. A character that it does not know is left out."""
    check_exact(tokenizer)
    if tokenizer.eot is None:
        raise UserError(
            "llama.cpp takes the id 11 for the end of text of a tokenizer that has none, as this "
            "one has; characters of separate documents have one (data/custom/prepare.py), so do "
            "bytes and byte pairs"
        )
    tokens, merges = as_letters(tokenizer)
    # llama.cpp wants a merge. The byte 255, here twice, is in no text in UTF-8.
    merges = merges or [("ÿ", "ÿ")]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[tokenizer.eot] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the pattern by which text is cut
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def is_gguf_export(path):
    """Whether the file at `path` is what `write_gguf` wrote."""
    gguf = the_package()
    try:
        return path.is_file() and WRITER in gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError):
        return False


def the_package():
    try:
        import gguf
    except ImportError as error:
        raise UserError("a GGUF file needs the package gguf: pip install gguf") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every key
    return gguf
