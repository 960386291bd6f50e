"""An environment's validation, as the trainer plays it, of one model or two beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Domain
from slurmkit.errors import UserError
from slurmkit.evaluate.intervals import CONFIDENCE, difference, estimate
from slurmkit.evaluate.models import Model
from slurmkit.grpo.causal_lm import check_model
from slurmkit.grpo.cluster import engine_pool, ray_connection, start_engines, watch_ray
from slurmkit.grpo.interrupt import guarded
from slurmkit.grpo.metrics import say
from slurmkit.grpo.progress import reported
from slurmkit.grpo.validation import pass_at_k, play_validation, validation_metrics
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Group, refuse_prompts_that_never_fit


def evaluate(config: TrainConfig, models: Mapping[str, Model]) -> dict[str, Any]:
    """Play the validation tasks with each of `models`, `checkpoint` and perhaps `baseline`, one after the other.

    Raises what the trainer does: UserError for data or a model that cannot be used, NodeFailure and Failure.
    """
    configs = {side: _config_for(config, model) for side, model in models.items()}
    domain = make_domain(config)
    if not domain.validation_tasks:
        raise UserError("there is no validation task: give data.validation, or data.train.split_validation_size")
    for side, model in models.items():
        check_model(model.path, configs[side])
    played = {}
    for side, model in models.items():
        say(f"playing with {model.name}")
        played[side] = asyncio.run(_play(configs[side], model.path, domain))
    return {"environment": config.env.name, "confidence": CONFIDENCE, **compared(played, config)}


def _config_for(config: TrainConfig, model: Model) -> TrainConfig:
    """The configuration with this model in it, whose errors then name it."""
    data = config.model_dump(mode="json")
    trusts = config.policy.trusts_remote_code
    allowed = [*config.policy.allow_remote_code, *([str(model.path)] if trusts else ())]
    policy = {**data["policy"], "model_name": str(model.path), "from_scratch": None, "allow_remote_code": allowed}
    return TrainConfig.model_validate({**data, "policy": policy})


async def _play(config: TrainConfig, folder: Path, domain: Domain) -> list[Group]:
    chat = Chat.of(folder, config.policy)
    await refuse_prompts_that_never_fit("validation", domain.validation_tasks, domain, chat, config)
    async with AsyncExitStack() as stack:
        temporary = stack.enter_context(ray_connection())
        pool = await stack.enter_async_context(engine_pool(config, start_engines(config, folder, temporary)))
        await guarded(reported(f"loading {folder}", pool.start()), watch_ray())
        return await guarded(play_validation(config, domain, pool, chat), watch_ray())


def compared(played: Mapping[str, Sequence[Group]], config: TrainConfig) -> dict[str, Any]:
    """Figures of each side, and where there are two, their difference over the tasks that both have.

    A task counts once, as the mean of its episodes; one whose episodes all broke is left out.
    """
    grpo = config.grpo
    values = {side: [_values(group, grpo.pass_at) for group in groups] for side, groups in played.items()}
    figures: dict[str, Any] = {}
    for side, groups in played.items():
        metrics = validation_metrics(groups, grpo)  # Failure where all broke
        there = [each for each in values[side] if each]
        figures[side] = {
            **{name: estimate(_of(there, name), grpo.seed).record() for name in _names(there)},
            **{name: metrics[f"val:{name}"] for name in ("completion_tokens_mean", "truncated_fraction")},
            "broken_episodes": int(metrics["val:broken_episodes"]),
            "tasks": len(there),
        }
    if "baseline" in played:
        figures["difference"] = {}
        for name in _names(values["checkpoint"]):
            pairs = zip(values["checkpoint"], values["baseline"], strict=True)
            both = [(one[name], other[name]) for one, other in pairs if name in one and name in other]
            if both:
                ours, theirs = zip(*both, strict=True)
                figures["difference"][name] = difference(ours, theirs, grpo.seed).record()
    names = [group.task.name for group in played["checkpoint"]]
    tasks = [
        {"task": name, **{side: values[side][index] or None for side in values}} for index, name in enumerate(names)
    ]
    return {"episodes_per_task": grpo.val_num_generations_per_prompt, "figures": figures, "tasks": tasks}


def _values(group: Group, pass_at: Sequence[int]) -> dict[str, float]:
    """A task's own figures; none where all of its episodes broke."""
    episodes = group.episodes
    if not episodes:
        return {}
    correct = sum(episode.score.correct for episode in episodes)
    figures = {"accuracy": correct / len(episodes), "reward": fmean(each.score.reward for each in episodes)}
    # pass@1 is the accuracy; a task of which some episodes broke may have too few for the larger k.
    return figures | {f"pass@{k}": pass_at_k(len(episodes), correct, k) for k in pass_at if 1 < k <= len(episodes)}


def _names(tasks: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks for name in task))


def _of(tasks: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [task[name] for task in tasks if name in task]


def rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row for each figure, with a cell for each side and the difference."""
    figures = result["figures"]
    for name in figures["checkpoint"]:
        yield [name.replace("_", " "), *(_cell(figures[side].get(name)) for side in figures)]


def _cell(found: Any) -> str:
    if isinstance(found, dict):
        return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    return "" if found is None else f"{found:g}" if isinstance(found, int) else f"{found:.3f}"
