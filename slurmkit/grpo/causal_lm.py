"""Opening a causal language model of any architecture that transformers knows, or is allowed to run the code of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from slurmkit.config.model import LoraCfg
from slurmkit.config.schema import TrainConfig
from slurmkit.errors import UserError
from slurmkit.grpo.metrics import say
from slurmkit.grpo.rope import exact_length

if TYPE_CHECKING:
    from slurmkit.grpo.adapters import Adapters

# Styles of transformers' tensor-parallel plans that `grpo/sharding.py` has an equal of.
TENSOR_PARALLEL_STYLES = frozenset({"colwise", "rowwise", "replicated_with_grad_allreduce"})


def check_model(path: Path, config: TrainConfig) -> None:
    """Raise UserError where the folder's model cannot be trained as `config` asks. No weights are read."""
    policy = config.policy
    name = policy.model_name or path
    try:
        with torch.device("meta"):
            model = blank_model(path, trust_remote_code=policy.trusts_remote_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"policy.model_name: {name} brings code of its own, which runs as you: read it, then allow it with "
                f"policy.allow_remote_code: [{name}]"
            ) from None
        if "for this kind of AutoModel" in reason:
            raise UserError(
                f"policy.model_name: {name} is no causal language model: transformers has no AutoModelForCausalLM for "
                f"{reason.partition('<class ')[2].partition('>')[0] or 'its configuration'}"
            ) from None
        raise UserError(f"policy.model_name: transformers cannot open {name}: {reason}") from None
    vocabulary = model.config.get_text_config().vocab_size
    if unknown := [token for token in policy.generation.stop_token_ids or () if token >= vocabulary]:
        raise UserError(
            f"policy.generation.stop_token_ids {unknown}: {name} has the tokens 0 to {vocabulary - 1} (vocab_size)"
        )
    length = exact_length(model.config.get_text_config())
    if length is not None and policy.max_total_sequence_length > length:
        say(
            f"policy.max_total_sequence_length {policy.max_total_sequence_length}: the RoPE frequencies of {name} "
            f"follow the length beyond {length} tokens, where engine and policy differ: set it to {length} at most for "
            "equal logprobs (docs/generation.md)"
        )
    settings = policy.dtensor_cfg
    if settings.tensor_parallel_size > 1:
        nodes = config.num_policy_nodes if settings.hybrid_sharding else 1
        shards = config.num_data_parallel_ranks // nodes
        _check_tensor_parallel(model, str(name), settings.tensor_parallel_size, shards)
    if settings.lora_cfg.enabled:
        add_adapters(model, settings.lora_cfg, seed=0)


def add_adapters(model: Any, settings: LoraCfg, seed: int) -> Adapters:
    """Freeze the model and put adapters beside its layers; see `Adapters`."""
    from slurmkit.grpo.adapters import Adapters  # peft, which most runs have no use for, takes a second to import

    return Adapters(model, settings, seed)


def _check_tensor_parallel(model: Any, name: str, size: int, shards: int) -> None:
    key = f"policy.dtensor_cfg.tensor_parallel_size {size}"
    plan = tensor_parallel_plan(model)
    if not plan:
        raise UserError(f"{key}: transformers has no tensor-parallel plan for {name} ({type(model).__name__}): set 1")
    if unknown := sorted(set(plan.values()) - TENSOR_PARALLEL_STYLES):
        raise UserError(
            f"{key}: transformers' plan for {name} ({type(model).__name__}) has styles that slurmkit cannot follow "
            f"({', '.join(unknown)}): set 1"
        )
    for attribute in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(model.config, attribute, None)
        if count is not None and count % size:
            raise UserError(f"{key} must divide {attribute} of {name}, which is {count}")
    for module_name, module in model.base_model.named_modules():
        style = plan.get(generic_name(module_name))
        if style == "colwise":
            # Columns are split between neighbours, then rows (or what there is of a bias) over the others.
            parts = {"out_features": size if module.bias is None else size * shards, "in_features": shards}
        elif style == "rowwise":
            parts = {"in_features": size}
        else:
            continue
        for attribute, count in parts.items():
            if getattr(module, attribute) % count:
                raise UserError(
                    f"{key} with {shards} data-parallel shards: {attribute} {getattr(module, attribute)} of "
                    f"{module_name} in {name} cannot be divided by {count}"
                )


def blank_model(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The architecture in float32, its buffers right and its weights whatever was in memory (which takes none)."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    model.tie_weights()  # which is a part of what was left out
    return model


def whole_model(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The model in float32, in the CPU's memory."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=torch.float32)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The repeated blocks, in order: what transformers says must not be split, else the longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = list(_outermost(model, names))
    if not found:
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        found = list(max(lists, key=len, default=()))
    return found


def _outermost(module: torch.nn.Module, names: set[str]) -> Iterator[torch.nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def tensor_parallel_plan(model: Any) -> dict[str, str]:
    """Names below the base model, layer numbers as `*`, to styles: transformers' own, for the layers.

    Embeddings and head stay whole on every rank, tied or not.
    """
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    return {name: style for name, style in plan.items() if "*" in name}


def generic_name(name: str) -> str:
    """As plans have it. Example: "layers.12.mlp.up_proj" is "layers.*.mlp.up_proj"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
