"""A tiny model that knows the form of an answer and little more, so that a run needs nothing from the network.

Qwen3's architecture with a byte tokenizer, trained for some seconds on the environment's demonstrations. Those are
sometimes right: reinforcement learning strengthens what happens, so something right has to happen.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from slurmkit.config.model import FromScratch
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Domain, Message
from slurmkit.errors import UserError
from slurmkit.grpo.metrics import say
from slurmkit.grpo.progress import Progress
from slurmkit.rollout.chat import Chat

_END = "<|end|>"
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}" + _END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WARM_UP_STEPS = 20
# The narrowest attention heads that vLLM has a kernel for on a CPU.
_LEAST_HEAD_DIM = 32


def starting_model(config: TrainConfig, domain: Domain, run_directory: Path, *, going_on: bool = False) -> Path:
    """The folder of the model that training starts from, or did if it is `going_on`. UserError where there is none."""
    sizes, name = config.policy.from_scratch, config.policy.model_name
    if sizes is not None:
        folder = run_directory / "model"
        if going_on and folder.is_dir():
            return folder
        if sizes.head_dim is None and config.policy.generation.backend == "vllm" and not config.cluster.gpus_per_node:
            width = max(_LEAST_HEAD_DIM, sizes.hidden_size // sizes.num_attention_heads)
            sizes = FromScratch.model_validate({**sizes.model_dump(), "head_dim": width})
        say(f"making a model: {sizes.supervised_steps} supervised steps, to {folder}")
        limit = config.policy.max_total_sequence_length
        make_model(folder, sizes, domain, max_length=limit, seed=config.grpo.seed)
        return folder
    assert name is not None  # the schema has seen to it
    return model_folder(name)


def model_folder(name: str, key: str = "policy.model_name") -> Path:
    """The folder of the model that `key` names: itself, or what is on the hub. UserError where there is none."""
    if Path(name).is_dir():
        return Path(name).absolute()
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: {name!r} is no folder and cannot be had from the hub: {reason}") from None


def make_model(folder: Path, sizes: FromScratch, domain: Domain, *, max_length: int, seed: int) -> None:
    """Write model and tokenizer to `folder`, which `from_pretrained` opens; it is complete or not there.

    The same sizes, domain and seed give the same weights on the same machine.
    """
    disable_progress_bar()
    # So small that a second thread gains a fifth on an idle machine, and loses minutes on a busy one.
    torch.set_num_threads(1)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(unfinished)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                # Kernels like multiples of 8.
                vocab_size=-(-len(tokenizer) // 8) * 8,
                hidden_size=sizes.hidden_size,
                num_hidden_layers=sizes.num_hidden_layers,
                num_attention_heads=sizes.num_attention_heads,
                num_key_value_heads=sizes.num_key_value_heads,
                head_dim=sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads,
                intermediate_size=sizes.intermediate_size,
                max_position_embeddings=max_length,
                # Input and output embeddings of a model this small do better apart.
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    _supervise(model, Chat(unfinished), sizes, domain, max_length=max_length, seed=seed)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def byte_tokenizer() -> Any:
    # One token per byte, in the printable stand-ins that byte-level tokenizers use.
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_END,
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=_TEMPLATE,
    )


def _token_logprobs(logits_BTV: torch.Tensor, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """Natural log-probability of every token given those before it, in float32: [B, T], 0 at the first position."""
    logits_BTV = logits_BTV[:, :-1].float()
    picked_BT = logits_BTV.gather(-1, token_ids_BT[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(picked_BT - logits_BTV.logsumexp(-1), (1, 0))


def _supervise(model: Any, chat: Chat, sizes: FromScratch, domain: Domain, *, max_length: int, seed: int) -> None:
    """Next-token prediction on demonstrated replies, the prompt given."""
    rng = Random(f"demonstrations {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.supervised_lr, betas=(0.9, 0.95), weight_decay=0.0)
    progress = Progress("making a model")
    for step in range(sizes.supervised_steps):
        progress.log(f"{step} of {sizes.supervised_steps} supervised steps")
        rows = []
        for task in rng.choices(domain.train_tasks, k=sizes.supervised_batch_size):
            prompt = chat.prompt_ids((Message("user", task.question),))
            rows.append((prompt, chat.reply_ids(domain.demonstrate(task, rng))))
        # A prompt as long as the context leaves nothing to learn from.
        rows = [(prompt, reply) for prompt, reply in rows if len(prompt) + len(reply) <= max_length]
        if not rows:
            continue
        width = max(len(prompt) + len(reply) for prompt, reply in rows)
        ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
        counts_BT = torch.zeros(len(rows), width)
        for b, (prompt, reply) in enumerate(rows):
            ids_BT[b, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
            counts_BT[b, len(prompt) : len(prompt) + len(reply)] = 1
        # Padding on the right needs no attention mask: nothing that counts comes after it.
        logprobs_BT = _token_logprobs(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
        loss = -(logprobs_BT * counts_BT).sum() / counts_BT.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
            group["lr"] = sizes.supervised_lr * warm_up * (1 - 0.9 * step / sizes.supervised_steps)
        optimizer.step()
        optimizer.zero_grad()
