"""LoRA (arXiv 2106.09685) through peft: adapters that train beside frozen linear layers.

Engines and checkpoints get whole models, adapters merged in; the adapters alone are what a run goes on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from slurmkit.config.model import LoraCfg
from slurmkit.errors import UserError

# peft's own name of a folder's only adapter, and of the file that PeftModel.from_pretrained opens.
_NAME, _FILE = "default", "adapter_model.safetensors"
# Where peft's own wrapper has the model.
_PREFIX = "base_model.model."


class Adapters:
    """The adapters of one model, which is frozen otherwise."""

    def __init__(self, model: Any, settings: LoraCfg, seed: int) -> None:
        """Put adapters, which change nothing yet, beside the model's linear layers.

        UserError where `settings.target_modules` names what the model does not have, or what is not linear.
        """
        key = "policy.dtensor_cfg.lora_cfg.target_modules"
        self._model = model
        self._config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.dim,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules="all-linear" if settings.adapts_all_linear else list(settings.target_modules),
        )
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(self._config, model)
            except ValueError as error:
                raise UserError(f"{key}: {str(error).strip().partition(chr(10))[0]}") from None
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        for name, layer in self._layers.items():
            if not layer.lora_A or layer.base_layer.weight.ndim != 2:
                kind = type(layer.base_layer).__name__
                raise UserError(f"{key}: {name} is of the kind {kind}, and adapters are for linear layers only")

    def merged(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`state`, the model's whole one, as that of a model without adapters: W + B A × alpha / dim (equation 3).

        In float32, whatever the frozen weights are held in.
        """
        whole = {name: tensor.float() for name, tensor in state.items()}
        result = {name.replace(".base_layer.", "."): tensor for name, tensor in whole.items() if ".lora_" not in name}
        for owner, layer in self._layers.items():
            a, b = whole[f"{owner}.lora_A.{_NAME}.weight"], whole[f"{owner}.lora_B.{_NAME}.weight"]
            delta = b @ a * layer.scaling[_NAME]
            # A new tensor, as the old one may be the model's own.
            result[f"{owner}.weight"] = result[f"{owner}.weight"] + (delta.T if layer.fan_in_fan_out else delta)
        return result

    def save(self, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write what `take_up`, and peft itself, open. `state` is the model's whole one."""
        folder.mkdir()
        own = get_peft_model_state_dict(self._model, state_dict=dict(state))
        save_file({f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in own.items()}, folder / _FILE)
        self._config.save_pretrained(str(folder))

    def take_up(self, folder: Path) -> None:
        """Go on with what was saved; before the model is sharded."""
        saved = load_file(folder / _FILE)
        set_peft_model_state_dict(self._model, {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items()})

    @contextmanager
    def off(self) -> Iterator[None]:
        """For as long as the context lasts, the model is what it was before it had adapters."""
        # Not peft's own switch: it turns gradients off and on again, of parameters that FSDP2 has replaced.
        for layer in self._layers.values():
            layer.set_scale(_NAME, 0.0)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.set_scale(_NAME, 1.0)

    def set_dropout(self, *, on: bool) -> None:
        """Dropout of the adapters' inputs, which is for updates only."""
        for layer in self._layers.values():
            layer.lora_dropout.train(on)
