"""Tiny random models with a byte-level tokenizer, built offline in about a second.

    build_tiny_model(path, family="qwen2", tied=True, seed=0) -> config.json, model.safetensors, tokenizer.json

Two layers of width 128, 4 heads of size 32 (vLLM's smallest on CPU) over 2 key-value heads, 512 positions. Weights are
drawn wide enough that next-token distributions are far from uniform, so that wrong log-probs cannot hide.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
MAX_POSITIONS = 512
VOCAB_SIZE = 260
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
"""Ids 256 to 259, after the 256 bytes. A turn ends with <|im_end|>."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, four special tokens and a ChatML template."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_model(*, family: str = "qwen2", tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A tiny fp32 causal language model with random weights; leaves the global random state as it was."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=259,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
        # Biases and norms start at 0 and 1: a loader that forgets them would go unnoticed.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.float().eval()


def build_tiny_model(path: str | Path, *, family: str = "qwen2", tied: bool = True, seed: int = 0) -> str:
    """Save a tiny random model with its tokenizer to `path` (made when missing).

    Returns:
        The path as a string, ready for `from_pretrained` and for vLLM.
    """
    logging.disable_progress_bar()
    random_model(family=family, tied=tied, seed=seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)
