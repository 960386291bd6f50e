"""The GRPO loop, on the driver."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import NoReturn

from slurmkit.config.log_dir import link_logs, problem_with
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Domain, Task
from slurmkit.envs.tasks import TaskOrder
from slurmkit.errors import Failure, NodeFailure, UserError
from slurmkit.generation.actors import together
from slurmkit.generation.pool import EnginePool
from slurmkit.grpo.ahead import Rollouts
from slurmkit.grpo.batch import OptimizerStep, optimizer_steps
from slurmkit.grpo.causal_lm import check_model
from slurmkit.grpo.checkpoint import Checkpoints, TrainerState, weights_digest
from slurmkit.grpo.cluster import engine_pool, ray_connection, serving_folder, start_actors, watch_ray
from slurmkit.grpo.credit import by_rollout, credit, make_samples
from slurmkit.grpo.from_scratch import starting_model
from slurmkit.grpo.interrupt import Interrupted, Interrupts, guarded
from slurmkit.grpo.metrics import RunLog, check_finite, say, timed, whole_step
from slurmkit.grpo.plots import Plots
from slurmkit.grpo.policy import Policy
from slurmkit.grpo.progress import Count, reported
from slurmkit.grpo.resume import starting_point
from slurmkit.grpo.rewards import shaped_group
from slurmkit.grpo.sample_files import write_samples
from slurmkit.grpo.saving import Saver
from slurmkit.grpo.selection import NothingToLearn, without_truncated
from slurmkit.grpo.throughput import Gauge
from slurmkit.grpo.turns import Turns
from slurmkit.grpo.validation import TRAINING, is_good_enough, play_validation, validation_metrics, write_transcripts
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Group, Sampling, collect, refuse_prompts_that_never_fit
from slurmkit.rollout.episode import Limits
from slurmkit.rollout.sample import Sample


async def train(
    config: TrainConfig, interrupts: Interrupts, make_domain: Callable[[TrainConfig], Domain] = make_domain
) -> None:
    """Run, or go on with, the training that `config` describes.

    Raises UserError for data or a model that cannot be used, NodeFailure where Ray or an actor died, Failure where an
    actor raised or no group carried signal for too long, and Interrupted, once all is saved, where that was asked for.
    """
    started = time.monotonic()
    run_directory = Path(config.checkpointing.checkpoint_dir).absolute()
    log_dir = Path(config.logger.log_dir).absolute() if config.logger.log_dir is not None else None
    if log_dir is not None and (problem := problem_with(run_directory, log_dir)):
        raise UserError(f"logger.log_dir {log_dir}: {problem}")
    domain = make_domain(config)
    epochs = config.grpo.max_num_epochs
    last_step = min(config.grpo.max_num_steps, epochs * len(domain.train_tasks) // config.grpo.tasks_per_batch)
    if last_step == 0:
        raise UserError(
            f"grpo.num_prompts_per_step {config.grpo.num_prompts_per_step}"
            + (" times grpo.batch_multiplier" if config.grpo.batch_multiplier > 1 else "")
            + f" is more than the {len(domain.train_tasks)} training tasks times grpo.max_num_epochs {epochs}: "
            "there is not one step to make"
        )
    if config.validates and not domain.validation_tasks:
        raise UserError("there is no validation task, and the configuration asks for validation (grpo.val_*)")
    checkpoints = Checkpoints(run_directory, config.checkpointing)
    found = starting_point(checkpoints, config)
    order = TaskOrder(domain.train_sources, seed=config.grpo.seed, shuffle=config.data.shuffle)
    starting_path = None
    if found is None or config.needs_starting_model:
        starting_path = starting_model(config, domain, run_directory, going_on=found is not None)
    starting_digest = weights_digest(starting_path) if starting_path and config.needs_starting_model else ""
    if found is None:
        assert starting_path is not None
        checkpoint, model_path = None, starting_path
        state = TrainerState(0, 0, 0, 0, order.digest, {}, starting_digest)
    else:
        checkpoint, state = found
        model_path = checkpoint / "model"
        say(f"going on after step {state.step}, from {checkpoint}")
        if state.tasks_digest != order.digest:
            raise UserError(f"{checkpoint} was trained on other tasks: give another checkpointing.checkpoint_dir")
        if state.starting_digest and state.starting_digest != starting_digest:
            raise UserError(
                f"policy.model_name: {starting_path} holds other weights than those that {checkpoint} was trained "
                "beside, as its reference or under its adapters: put them back, or give another "
                "checkpointing.checkpoint_dir"
            )
    order.position = state.position
    run_directory.mkdir(parents=True, exist_ok=True)

    check_model(model_path, config)
    chat = Chat.of(model_path, config.policy)
    for name, tasks in (("training", domain.train_tasks), ("validation", domain.validation_tasks)):
        await refuse_prompts_that_never_fit(name, tasks, domain, chat, config)
    async with AsyncExitStack() as stack:
        say("starting Ray")
        temporary = stack.enter_context(ray_connection())
        serving = stack.enter_context(serving_folder(config, run_directory))
        policy, engines, transfer = start_actors(config, model_path, state.updates, temporary, serving)
        interrupts.attend()
        pool = await stack.enter_async_context(engine_pool(config, engines))
        say(f"loading {model_path} (policy ranks: {config.num_ranks}, engines: {len(engines)})")
        starting = together(
            reported("loading the policy", policy.start(model_path, starting_path, checkpoint, state.updates)),
            reported("loading the engines", pool.start()),
        )
        turns = Turns(policy, pool, transfer, config.takes_turns)
        await guarded(interrupts.unless(starting), watch_ray())
        await turns.begin()
        is_own = checkpoint is not None and checkpoint.parent == run_directory
        resume_after = state.step if is_own else None
        if log_dir is not None:
            link_logs(run_directory, log_dir)
        log = stack.enter_context(RunLog(run_directory, config, last_step=last_step, resume_after=resume_after))
        plots = await stack.enter_async_context(Plots(run_directory))
        saving = Saver(checkpoints, policy, chat, config, saved=checkpoint, started=started)
        saver = await stack.enter_async_context(saving)
        gauge = Gauge(config, await policy.describe())
        trainer = Trainer(
            config, domain, order, chat, pool, policy, turns, saver, log, plots, gauge, interrupts, last_step, state
        )
        await guarded(trainer.run(), watch_ray())


@dataclass(slots=True)
class Trainer:
    """The loop and the parts that it moves things between."""

    config: TrainConfig
    domain: Domain
    order: TaskOrder
    chat: Chat
    pool: EnginePool
    policy: Policy
    turns: Turns
    saver: Saver
    log: RunLog
    plots: Plots
    gauge: Gauge
    interrupts: Interrupts
    last_step: int
    state: TrainerState
    episodes: dict[int, Count] = field(default_factory=dict)
    """Of the steps whose rollouts have begun."""

    async def run(self) -> None:
        """All steps that are left.

        Consumes tasks; waits for rollouts, then for the update, one after the other; produces lines in metrics.jsonl
        and checkpoints; ends after the last step, with the first failure, or, once asked to leave, with all that is
        finished saved.
        """
        # All that was imported stays: searching it for garbage would take a fifth of a second in the middle of a step.
        gc.collect()
        gc.freeze()
        # What a step makes ends with it, and little of that is in circles: looked for every 700 objects, they cost a
        # tenth of the driver's time.
        gc.set_threshold(50_000, 10, 10)
        try:
            rollouts = Rollouts(
                self.play_step,
                self.order,
                self.config.grpo,
                last_step=self.last_step,
                num_tasks=self.config.grpo.max_num_epochs * len(self.domain.train_tasks),
            )
            async with rollouts:
                await self.make_steps(rollouts)
            await self.saver.settle()
        except Interrupted:
            await self.leave()
        except NodeFailure:
            raise
        except NothingToLearn:
            if await self.save_finished():
                say(f"everything up to step {self.state.step} is saved")
            raise
        except Failure:
            # A full disk fails whoever writes next, and the save is what filled it: its failure says more.
            await self.saver.settle()
            raise

    async def make_steps(self, rollouts: Rollouts) -> None:
        """A step that has begun to change the weights is finished whatever happens; until then it can be dropped."""
        if self.state.step == 0 and self.config.grpo.val_at_start:
            self.state = replace(self.state, metrics=await self.interrupts.unless(self.validate(0)))
            self.log.write(0, self.state.metrics)
            self.plots.redraw()
        while not self.is_over(rollouts):
            step = self.state.step + 1
            metrics: dict[str, float] = {}
            busy = self.pool.busy_seconds()
            with whole_step(metrics):
                with timed(metrics, "time:rollout"):
                    rollout = rollouts.of(step, self.state.updates)
                    episodes = self.episodes.setdefault(step, Count())
                    selection = await self.interrupts.unless(reported(f"step {step}: rollout", rollout, episodes))
                    del self.episodes[step]
                for remark in selection.remarks():
                    say(f"step {step}: {remark}")
                groups = [shaped_group(group, self.config.grpo) for group in selection.kept]
                samples = make_samples(groups)
                await self.turns.of_policy()
                if self.config.loss_fn.needs_prev_logprobs or self.config.loss_fn.needs_reference_logprobs:
                    with timed(metrics, "time:logprobs"):
                        scoring = reported(f"step {step}: logprobs", self.score(samples))
                        samples = await self.interrupts.unless(scoring)
                samples, kept_metrics = credit(groups, samples, self.config.grpo, self.config.loss_fn)
                if self.config.grpo.overlong_filtering:
                    samples = without_truncated(samples)
                updates = optimizer_steps(
                    samples,
                    global_batch_size=self.config.policy.train_global_batch_size,
                    micro_batch_tokens=self.config.policy.micro_batch_tokens,
                    num_ranks=self.config.num_data_parallel_ranks,
                    loss_fn=self.config.loss_fn,
                )
                is_leaving = False
                metrics |= selection.metrics(kept_metrics) | rollouts.ages(selection.kept, step)
                if updates:
                    with timed(metrics, "time:update"):
                        metrics |= await reported(f"step {step}: update", self.update(updates, step))
                    with timed(metrics, "time:weights"):
                        is_leaving = not await self.give_weights()
                else:
                    await self.turns.of_engines(have_changed=False)
                metrics |= {"train:engine_restarts": float(self.pool.restarts), **self.saver.check()}
                is_last = self.is_last(step, rollouts)
                saving = self.due_to_save(step, is_last) and not is_leaving
                validating = self.due_to_validate(step, saving, is_last) and not is_leaving
                if validating:
                    with timed(metrics, "time:validation"):
                        metrics |= await self.validate(step)
                    saving = saving or (self.config.checkpointing.enabled and is_good_enough(metrics, self.config.grpo))
                if (saving or validating) and (count := self.config.logger.num_train_samples):
                    folder = Path(self.config.checkpointing.checkpoint_dir)
                    kept = write_samples(folder, step, samples, by_rollout(groups), self.chat, count)
                    self.log.show("train", kept)
                check_finite(step, metrics)
                has_signal = metrics["train:groups_with_signal"] > 0
                self.state = replace(
                    self.state,
                    step=step,
                    position=rollouts.position,
                    updates=self.state.updates + len(updates),
                    steps_without_signal=0 if has_signal else self.state.steps_without_signal + 1,
                    metrics=metrics,
                )
                if saving:
                    with timed(metrics, "time:checkpoint"):
                        metrics |= await self.saver.copy(self.state)
            busy = self.pool.busy_seconds() - busy
            metrics |= self.gauge.read(selection.generated, updates, metrics, engines_busy=busy)
            self.log.write(step, metrics)
            if saving:
                self.log.flush()
                self.saver.logged()
            if validating:
                self.plots.redraw()
            if is_leaving:
                raise Interrupted
            self.check_signal()

    async def leave(self) -> NoReturn:
        """Save the last finished step, then raise Interrupted that says so."""
        is_saved, step = await self.save_finished(), self.state.step
        if not step:
            raise Interrupted
        if not is_saved:
            raise Interrupted(f"interrupted after step {step}: nothing is saved, as checkpointing.enabled is false")
        raise Interrupted(f"interrupted after step {step}: everything is saved in step_{step}")

    async def save_finished(self) -> bool:
        """Save the last finished step unless it is saved already. Whether there is a step, and saving is enabled."""
        folder, step = await self.saver.settle(), self.state.step
        if not step or not self.config.checkpointing.enabled:
            return False
        if folder is None or folder.name != f"step_{step}":
            self.log.flush()
            await self.saver.copy(self.state)
            self.saver.logged()
            await self.saver.settle()
        return True

    async def play_step(self, step: int, tasks: Sequence[Task], before: int) -> list[Group]:
        """Groups of a step that has had `before` tasks already."""
        episodes = self.config.grpo.num_generations_per_prompt
        count = self.episodes.setdefault(step, Count())
        count.total += len(tasks) * episodes
        return await collect(
            tasks,
            episodes_per_task=episodes,
            domain=self.domain,
            policy=self.pool,
            chat=self.chat,
            sampling=Sampling.of(self.config, (TRAINING, step), before * episodes),
            limits=Limits.of(self.config),
            weight_version=self.state.updates,
            finished=count.add,
        )

    async def score(self, samples: list[Sample]) -> list[Sample]:
        """The samples with those logprobs that the loss asks for: the policy's own, and the reference model's."""
        loss_fn = self.config.loss_fn
        if loss_fn.needs_prev_logprobs:
            found = await self.policy.logprobs(samples, of="policy")
            samples = [replace(each, prev_logprobs=own) for each, own in zip(samples, found, strict=True)]
        if loss_fn.needs_reference_logprobs:
            found = await self.policy.logprobs(samples, of="reference")
            samples = [replace(each, reference_logprobs=own) for each, own in zip(samples, found, strict=True)]
        return samples

    async def update(self, updates: list[OptimizerStep], training_step: int) -> dict[str, float]:
        """Make the optimiser steps, one after the other; metrics over all of them."""
        loss_fn = self.config.loss_fn
        results = [await self.policy.update(step, training_step) for step in updates]
        sums = reduce(add, (result.sums for result in results))
        # Without them the engines are compared with the first update only: until then the policy is what they had.
        engine_sums = sums if loss_fn.needs_prev_logprobs else results[0].sums
        return {
            **sums.metrics(loss_fn, len(results)),
            **engine_sums.engine_metrics(loss_fn),
            "train:grad_norm": statistics.fmean(result.grad_norm for result in results),
            "train:lr": results[-1].lr,
            **{f"time:update_{name}": sum(each.seconds[name] for each in results) for name in results[0].seconds},
            "train:trained_tokens": sums.tokens,
            "train:peak_memory_gib": max(result.peak_memory_gib for result in results),
        }

    async def give_weights(self) -> bool:
        """Give the engines the new weights.

        False where the run was asked to leave meanwhile: in asynchronous training, completions under way may have to
        be finished first, which can take as long as there is left to save everything.
        """
        loading = self.turns.of_engines()
        if not self.config.grpo.max_age:
            await loading
            return True
        try:
            await self.interrupts.unless(loading)
        except Interrupted:
            return False
        return True

    async def validate(self, step: int) -> dict[str, float]:
        """Play the validation tasks; the first ones' conversations are kept."""
        groups = await play_validation(
            self.config,
            self.domain,
            self.pool,
            self.chat,
            weight_version=self.state.updates,
            phase=f"validation after step {step}" if step else "validation before training",
        )
        metrics = validation_metrics(groups, self.config.grpo)
        if kept := groups[: self.config.logger.num_val_transcripts]:
            folder = Path(self.config.checkpointing.checkpoint_dir)
            self.log.show("val", write_transcripts(folder, step, kept))
        return metrics

    def is_over(self, rollouts: Rollouts) -> bool:
        """Whether the last finished step is the run's last. Says so where that was not known from the start."""
        step, grpo = self.state.step, self.config.grpo
        if is_good_enough(self.state.metrics, grpo):
            metric = grpo.stop_at_validation_metric
            say(
                f"step {step}: {metric} {self.state.metrics[str(metric)]:.3f} has reached "
                f"grpo.stop_at_validation_threshold {grpo.stop_at_validation_threshold:g}: the run ends here"
            )
            return True
        is_last = self.is_last(step, rollouts)
        if is_last and step < self.last_step:
            say(f"step {step}: the tasks of grpo.max_num_epochs {grpo.max_num_epochs} are used up: the run ends here")
        return is_last

    def is_last(self, step: int, rollouts: Rollouts) -> bool:
        """Whether no step follows `step`, which has drawn its tasks; dynamic sampling draws no fixed number of them."""
        return step >= self.last_step or rollouts.are_used_up

    def due_to_save(self, step: int, is_last: bool) -> bool:
        checkpointing = self.config.checkpointing
        on_schedule = step % checkpointing.save_period == 0 or is_last
        return checkpointing.enabled and (self.saver.deadline.is_near() or on_schedule)

    def due_to_validate(self, step: int, saving: bool, is_last: bool) -> bool:
        """On schedule, or because the checkpoint about to be saved is judged by it."""
        grpo, judged_by = self.config.grpo, self.config.checkpointing.metric_name or ""
        return (
            (grpo.val_period > 0 and step % grpo.val_period == 0)
            or (grpo.val_at_end and is_last)
            or (saving and judged_by.startswith("val:"))
        )

    def check_signal(self) -> None:
        """Say when a step could not teach anything; Failure when that has gone on for too long."""
        without, limit = self.state.steps_without_signal, self.config.grpo.max_steps_without_signal
        if not without:
            return
        say(f"step {self.state.step}: no group carries signal (in each, all rewards are equal)")
        if limit is not None and without >= limit:
            raise NothingToLearn(
                f"no group carried signal in {without} steps in a row (grpo.max_steps_without_signal): the model is "
                "never, or always, right. Try easier tasks, a model that can do some of them, more generations per "
                "prompt, or set it to null to go on regardless"
            )
