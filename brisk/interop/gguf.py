"""Write a model and its tokenizer to a GGUF file, the format of llama.cpp.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensor names, keys and the
quantizer are from the `gguf` package, which llama.cpp's converter uses too. llama.cpp computes GELU
in its tanh form, on a CPU from a float16 table, so logits of a GPT-2 differ by about 1e-3.
"""

import logging

from brisk.errors import UserError
from brisk.interop.gpt2 import transpose_conv1d
from brisk.interop.tokenizer_json import as_letters, check_exact

WRITER = "briskgpt.export"  # key by which `is_gguf_export` finds our exports
DTYPES = {  # --gguf_dtype: (type of the matrices, type of the file)
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),  # 8-bit integers, with a float16 scale for each 32 of a row
}
LARGEST_FLOAT16 = 65504


def gguf_fields(theirs, weights, tokenizer, dtype="float32"):
    """Metadata of a GGUF file for `write_gguf`: pairs of a method name of `gguf.GGUFWriter` and its
    argument.

    Raises `UserError` if the `gguf` package is missing, the tokenizer cannot be converted exactly,
    or a weight overflows float16.
    """
    gguf = import_gguf()
    if dtype != "float32":
        for name, weight in weights.items():
            if weight.dim() > 1 and not weight.abs().max() <= LARGEST_FLOAT16:
                raise UserError(f"{name} overflows float16; use --gguf_dtype=float32")
    sizes = qwen3_sizes(theirs) if theirs["model_type"] == "qwen3" else gpt2_sizes(theirs)
    file_type = gguf.LlamaFileType[DTYPES[dtype][1]]
    check_exact(tokenizer)
    is_bpe = tokenizer.eot is not None
    vocabulary = bpe_fields(tokenizer, gguf) if is_bpe else trie_fields(tokenizer, gguf)
    return [("add_file_type", file_type), *sizes.items(), *vocabulary]


def write_gguf(path, theirs, weights, fields, dtype="float32"):
    """Write a model, as returned by `huggingface.to_hugging_face`, and its `gguf_fields` to `path`.

    `dtype`, a key of `DTYPES`, is the type of the matrices. Vectors and position embeddings are
    float32. With q8_0, matrices whose rows are not divisible by 32 are float16.
    """
    gguf = import_gguf()
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
    """{method of the writer: value} for the sizes of a GPT-2."""
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
    """The vocabulary of a tokenizer with an end-of-text, as a byte-pair encoding. A byte tokenizer
    has no merges; those of a character tokenizer build each character from its bytes. llama.cpp
    drops characters outside the vocabulary."""
    tokens, merges = as_letters(tokenizer)
    # llama.cpp requires a merge; the byte 255 does not occur in UTF-8
    merges = merges or [("ÿ", "ÿ")]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[tokenizer.eot] = gguf.TokenType.CONTROL
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "gpt-2"),  # the pattern that splits text
        ("add_token_list", tokens),
        ("add_token_types", types),
        ("add_token_merges", [" ".join(pair) for pair in merges]),
        ("add_bos_token_id", tokenizer.eot),
        ("add_eos_token_id", tokenizer.eot),
        ("add_add_bos_token", False),
        ("add_add_space_prefix", False),
    ]


def trie_fields(tokenizer, gguf):
    """The vocabulary of a character tokenizer without an end-of-text, for llama.cpp's RWKV
    tokenizer, which takes the longest matching token. llama.cpp's byte-pair encoding would take the
    id 11 as end-of-text and stop there. Characters outside the vocabulary are an error."""
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return [
        ("add_tokenizer_model", "rwkv"),
        ("add_token_list", [repr(token)[2:-1] for token in tokens]),  # with Python's escapes
        ("add_token_types", [gguf.TokenType.NORMAL] * len(tokens)),
        ("add_add_bos_token", False),
    ]


def is_gguf_export(path):
    """Whether the file `path` was written by `write_gguf`."""
    gguf = import_gguf()
    try:
        return path.is_file() and WRITER in gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError):
        return False


def import_gguf():
    try:
        import gguf
    except ImportError as error:
        raise UserError("a GGUF file needs the package gguf: pip install gguf") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it logs every key
    return gguf
