"""Writes a Llama as a GGUF file the way llama.cpp's converter does, for tests that read it back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path,
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    pre: str = "smollm",
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    """Write `model` (tied embeddings) and `tokenizer` to `path`; matrices are stored in `quantization`."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, tokenizer, config.vocab_size, pre)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            is_query = name.endswith("q_proj.weight")
            values = _interleave(values, config.num_attention_heads if is_query else config.num_key_value_heads)
        if values.ndim == 2 and quantization is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(_gguf_name(name), gguf.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: "PreTrainedTokenizerFast", size: int, pre: str) -> None:
    import json

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.backend_tokenizer.id_to_token(index) or f"<unused{index}>" for index in range(size)]
    control = set(tokenizer.all_special_ids) | {token["id"] for token in backend["added_tokens"] if token["special"]}
    kinds = [gguf.TokenType.CONTROL if index in control else gguf.TokenType.NORMAL for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))


def _interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs of dimensions where transformers rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_BLOCK_NAMES[rest.removesuffix('.weight')]}.weight"
