"""A model and its tokenizer in one GGUF file, as llama.cpp and what builds on it read them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names of tensors and keys
are the `gguf` package's, which llama.cpp's own converter takes them from, and so is the quantizer.
llama.cpp computes GELU by its tanh form and, on a CPU, from a table in half precision: logits of a
GPT-2 differ by about 1e-3 there.
"""

import logging

from brisk.errors import UserError
from brisk.interop.gpt2 import transpose_conv1d
from brisk.interop.tokenizer_json import as_letters, check_exact

WRITER = "briskgpt.export"  # a key of ours, which others pass over
DTYPES = {  # ours: (the type of matrices, the type of the file)
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),  # 8-bit integers, a float16 scale for each 32 of a row
}
LARGEST_FLOAT16 = 65504


def gguf_fields(theirs, weights, tokenizer, dtype="float32"):
    """Metadata of a GGUF file, for `write_gguf`: pairs of a method of `gguf.GGUFWriter` and its
    argument.

    Raises `UserError` where the file cannot be written: the `gguf` package is missing, the
    tokenizer cannot be carried, or a weight is beyond float16.
    """
    gguf = the_package()
    if dtype != "float32":
        for name, weight in weights.items():
            if weight.dim() > 1 and not weight.abs().max() <= LARGEST_FLOAT16:
                raise UserError(f"{name} has a weight beyond float16; take --gguf_dtype=float32")
    sizes = qwen3_sizes(theirs) if theirs["model_type"] == "qwen3" else gpt2_sizes(theirs)
    file_type = gguf.LlamaFileType[DTYPES[dtype][1]]
    check_exact(tokenizer)
    is_bpe = tokenizer.eot is not None
    vocabulary = bpe_fields(tokenizer, gguf) if is_bpe else trie_fields(tokenizer, gguf)
    return [("add_file_type", file_type), *sizes.items(), *vocabulary]


def write_gguf(path, theirs, weights, fields, dtype="float32"):
    """Write a model, as `huggingface.to_hugging_face` returns it, and its `gguf_fields` to the new
    file `path`. With another `dtype` of `DTYPES`, matrices are in that type; vectors and the
    embeddings of positions stay float32. Rows that q8_0 cannot divide by 32 are float16."""
    gguf = the_package()
    is_gpt2 = theirs["model_type"] == "gpt2"
    arch = gguf.MODEL_ARCH.GPT2 if is_gpt2 else gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_string(WRITER, "1")
    for method, value in fields:
        getattr(writer, method)(value)
    n_layer = theirs["n_layer" if is_gpt2 else "num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, n_layer)
    for name, weight in weights.items():
        weight = transpose_conv1d(name, weight) if is_gpt2 else weight
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = DTYPES[dtype][0]
        if weight.dim() < 2 or short.startswith("position_embd"):
            kind = "F32"
        elif kind == "Q8_0" and weight.shape[1] % 32 != 0:
            kind = "F16"
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(weight.contiguous().float().numpy(), kind)
        writer.add_tensor(short, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gpt2_sizes(theirs):
    """Sizes of a GPT-2 by the names of the writer's methods."""
    return {
        "add_block_count": theirs["n_layer"],
        "add_context_length": theirs["n_positions"],
        "add_embedding_length": theirs["n_embd"],
        "add_feed_forward_length": theirs["n_inner"] or 4 * theirs["n_embd"],
        "add_head_count": theirs["n_head"],
        "add_layer_norm_eps": theirs["layer_norm_epsilon"],
    }


def qwen3_sizes(theirs):
    return {
        "add_block_count": theirs["num_hidden_layers"],
        "add_context_length": theirs["max_position_embeddings"],
        "add_embedding_length": theirs["hidden_size"],
        "add_feed_forward_length": theirs["intermediate_size"],
        "add_head_count": theirs["num_attention_heads"],
        "add_head_count_kv": theirs["num_key_value_heads"],
        "add_key_length": theirs["head_dim"],
        "add_value_length": theirs["head_dim"],
        "add_layer_norm_rms_eps": theirs["rms_norm_eps"],
        "add_rope_freq_base": theirs["rope_theta"],
    }


def bpe_fields(tokenizer, gguf):
    """The vocabulary of a tokenizer with an end of text, as a byte-pair encoding: bytes have no
    merges, and those of characters build each from its bytes. llama.cpp leaves out characters that
    are not in the vocabulary."""
    tokens, merges = as_letters(tokenizer)
    # llama.cpp wants a merge. The byte 255, here twice, is in no text in UTF-8.
    merges = merges or [("ÿ", "ÿ")]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[tokenizer.eot] = gguf.TokenType.CONTROL
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "gpt-2"),  # the pattern by which text is cut
        ("add_token_list", tokens),
        ("add_token_types", types),
        ("add_token_merges", [" ".join(pair) for pair in merges]),
        ("add_bos_token_id", tokenizer.eot),
        ("add_eos_token_id", tokenizer.eot),
        ("add_add_bos_token", False),
        ("add_add_space_prefix", False),
    ]


def trie_fields(tokenizer, gguf):
    """The vocabulary of characters without an end of text. llama.cpp's byte-pair encoding takes the
    id 11 for a missing one and would stop there; its tokenizer for RWKV (the longest token that
    matches) needs none. There, a character that is not in the vocabulary is an error."""
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return [
        ("add_tokenizer_model", "rwkv"),
        ("add_token_list", [repr(token)[2:-1] for token in tokens]),  # escaped as Python does
        ("add_token_types", [gguf.TokenType.NORMAL] * len(tokens)),
        ("add_add_bos_token", False),
    ]


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
