"""What a training run takes from the file systems and leaves there, as far as its configuration says.

All of it without torch, and without reading more of a file than the answer needs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from slurmkit.config.data import HUB_NAME

if TYPE_CHECKING:
    from slurmkit.config.model import FromScratch
    from slurmkit.config.schema import TrainConfig

# A checkpoint holds, of every parameter, the weight and AdamW's two moments in float32 (grpo/checkpoint.py).
_CHECKPOINT_BYTES = 12
_MODEL_BYTES = 4
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2}
# Where a tokenizer keeps its chat template, besides a key of tokenizer_config.json.
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# The byte tokenizer of a model made from scratch: 256 bytes and 5 marks, rounded up to a multiple of 8.
_VOCABULARY = 264


def find_model(
    name: str, workdir: str, environ: Mapping[str, str], *, needs_template: bool = True
) -> tuple[Path | None, str | None]:
    """The folder of `policy.model_name`, None where only the hub has it, and what is wrong with it if anything is.

    `environ` is the job's. The folder is looked for where the trainer would: below its working directory, then as a
    name on the hub, whose cache has to hold it when HF_HUB_OFFLINE forbids asking.
    """
    folder = Path(workdir, name)
    if os.path.isdir(folder):
        try:
            return folder, _broken(folder, needs_template=needs_template)
        except OSError as error:
            return folder, f"the folder cannot be read: {error.strerror}"
    if not HUB_NAME.fullmatch(name):
        return None, f"no such folder; a relative path begins at workdir {workdir}, and ~ is taken as it stands"
    home = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = environ.get("HF_HUB_CACHE") or f"{environ.get('HF_HOME') or f'{home}/huggingface'}/hub"
    snapshots = Path(cache, "models--" + name.replace("/", "--"), "snapshots")
    held = next((path.parent for path in snapshots.glob("*/config.json")), None)
    if held is None and environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None, f"no folder, and with HF_HUB_OFFLINE it must be in the cache, where it is not: {snapshots}"
    return held, None


def _broken(folder: Path, *, needs_template: bool) -> str | None:
    if not (folder / "config.json").is_file():
        return "the folder holds no config.json: name one that from_pretrained opens"
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        return "the folder holds no weights (*.safetensors): is it complete?"
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")
    if needs_template and not inside and not any((folder / name).exists() for name in _TEMPLATES):
        return "its tokenizer has no chat template: name an instruct model, or give policy.tokenizer.chat_template"
    return None


def parameters_of(sizes: FromScratch) -> int:
    """Parameters of the Qwen3 model that grpo/from_scratch.py makes."""
    width, head = sizes.hidden_size, sizes.hidden_size // sizes.num_attention_heads
    attention = 2 * width * width + 2 * width * head * sizes.num_key_value_heads + 2 * head
    layer = attention + 3 * width * sizes.intermediate_size + 2 * width
    return sizes.num_hidden_layers * layer + 2 * _VOCABULARY * width + width


def parameters_in(folder: Path) -> float:
    """Parameters of a model's safetensors; the fewest that they can be, and 0 where they cannot be read."""
    try:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError):
        return 0
    return size / _DTYPE_BYTES.get(str(kind), 4)


def space_of(train: TrainConfig, parameters: float, run_dir: Path) -> tuple[float, int]:
    """Bytes of one checkpoint, and how many more than are there now the run will hold at the same time."""
    keep, period = train.checkpointing.keep_top_k, train.checkpointing.save_period
    # The best, the latest, and the one that is being written before an old one goes.
    most = math.inf if keep is None else keep + 2
    saves = math.ceil(steps_at_most(train, most * period) / period)
    there = sum(1 for _ in run_dir.glob("step_*"))
    return parameters * _CHECKPOINT_BYTES, max(1, int(min(most, saves)) - there)


def model_bytes(train: TrainConfig, parameters: float) -> float:
    """Bytes of the model that is made in the run directory, if one is."""
    return parameters * _MODEL_BYTES if train.policy.from_scratch else 0


def steps_at_most(train: TrainConfig, enough: float) -> int:
    """Steps that grpo.* and the tasks allow, where those can be read here; `enough` or more are not told apart."""
    grpo, paths = train.grpo, [source.data_path for source in train.data.train_sources.values()]
    wanted = min(enough, grpo.max_num_steps)
    tasks = 10**train.env.arithmetic.num_terms
    if paths != [None]:
        try:
            filled = (1 for path in paths for row in _lines(path or "") if row.strip())
            tasks = sum(islice(filled, math.ceil(wanted * grpo.num_prompts_per_step / grpo.max_num_epochs)))
        except OSError:
            return int(wanted)
    return int(min(wanted, grpo.max_num_epochs * tasks // grpo.num_prompts_per_step))


def _lines(path: str) -> Iterator[bytes]:
    """OSError where it is no file of lines."""
    if path.endswith(".parquet"):
        raise OSError("a table")
    with open(path, "rb") as rows:
        yield from rows
