"""`python -m slurmkit.bench.rollout`: the driver's own part of conversations in which engine and tools take no time.

The real rollouts (rollout/collect.py) with a tokenizer made here, a chat template of ChatML's kind with tools, and tool
calls in every reply. The engine's replies are ready-made. What is left is what the driver does about each turn: it
renders, reads calls, encodes what is new, and waits for nobody.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from slurmkit.bench.child import answer
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource, Tool
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.grpo.credit import make_samples
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Sampling, collect
from slurmkit.rollout.episode import Limits

_END = "<|im_end|>"
_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- 'Tools:\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{{- 'To call one: <tool_call>{"name": …, "arguments": {…}}</tool_call><|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
_WORDS = (
    *("search", "the", "calendar", "for", "an", "event", "email", "task", "customer", "name", "date", "status"),
    *("field", "value", "page", "of", "all", "that", "match"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """`groups` × `generations` episodes at once, each of `turns` replies of about `words` words, with `tools` tools."""

    groups: int = 64
    generations: int = 16
    turns: int = 6
    tools: int = 27
    words: int = 60
    rounds: int = 3
    seed: int = 0


class _Engine:
    """Calls a tool in every reply, at once."""

    def __init__(self, ready: Sequence[Completion]) -> None:
        self._ready = ready

    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        await asyncio.sleep(0)  # as a real one, it lets others go on
        return self._ready[sampling.seed % len(self._ready)]


class _Environment:
    """Answers each call at once, and ends the episode after so many replies."""

    def __init__(self, tools: tuple[Tool, ...], output: str, turns: int) -> None:
        self._tools, self._output, self._left = tools, output, turns

    async def start(self, task: Task) -> Opening:
        return Opening(task.messages, self._tools)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._left -= 1
        calls = reply.tool_calls if self._left else ()
        return [Message("tool", self._output, tool_call_id=call.id, name=call.name) for call in calls]

    async def score(self) -> Score:
        return Score(0.0, False)


class _Domain:
    """Tasks under one long system prompt."""

    def __init__(self, settings: Settings, rng: Random) -> None:
        rules = Message("system", _said(rng, 200))
        self.train_tasks = [Task(f"{n}", _said(rng, 30), "", (rules,)) for n in range(settings.groups)]
        self.train_sources = [TaskSource(self.train_tasks, 1.0)]
        self.validation_tasks: list[Task] = []
        self.tools = tuple(_tool(rng, number) for number in range(settings.tools))
        self._output, self._turns = json.dumps({"found": _said(rng, settings.words)}), settings.turns

    def environment(self) -> _Environment:
        return _Environment(self.tools, self._output, self._turns)

    def demonstrate(self, task: Task, rng: Random) -> str:
        return ""


def _said(rng: Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _tool(rng: Random, number: int) -> Tool:
    """About as long as those of NeMo Gym's Workplace Assistant, whose 27 make 16 kB."""
    properties = {f"argument_{n}": {"type": "string", "description": _said(rng, 8)} for n in range(4)}
    parameters = {"type": "object", "properties": properties, "required": [], "additionalProperties": False}
    about = {"name": f"tool_{number}", "description": _said(rng, 15), "parameters": parameters}
    return Tool({"type": "function", "function": about})


def _tokenizer(domain: _Domain, folder: Path) -> PreTrainedTokenizerFast:
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([json.dumps(dict(tool.definition)) for tool in domain.tools], trainer)
    model.add_special_tokens(["<|im_start|>", _END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=_END, chat_template=_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _completion(tokenizer: Any, text: str) -> Completion:
    ids = numpy.array(tokenizer(text + _END)["input_ids"], numpy.int32)
    return Completion(ids, numpy.full(len(ids), -1, numpy.float32), text, "stop", numpy.zeros(len(ids), numpy.int32))


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds of a turn, all that an episode costs the driver spread over its turns: medians of the rounds.

    `turn_cpu_ms` is the processor's time, of which another load on the machine takes little. Of that, `opening_ms` is
    what an opening takes that no other episode has had, and `samples_ms` what making the samples of an episode does.
    """
    rng = Random(settings.seed)
    domain = _Domain(settings, rng)
    calls = json.dumps({"name": "tool_1", "arguments": {"argument_0": _said(rng, 3)}})
    figures: dict[str, list[float]] = {"turn_ms": [], "turn_cpu_ms": [], "opening_ms": [], "samples_ms": []}
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-") as folder:
        tokenizer = _tokenizer(domain, Path(folder))
        texts = [f"{_said(rng, settings.words)}\n<tool_call>\n{calls}\n</tool_call>" for _ in range(32)]
        engine = _Engine([_completion(tokenizer, text) for text in texts])
        for number in range(settings.rounds + 1):
            chat = Chat(folder)  # which has seen no opening
            chat.prompt(Opening((Message("user", "?"),), domain.tools))
            began, cpu_began = time.perf_counter(), time.process_time()
            groups = asyncio.run(
                collect(
                    domain.train_tasks,
                    episodes_per_task=settings.generations,
                    domain=domain,
                    policy=engine,
                    chat=chat,
                    sampling=Sampling(1.0, 1000, (settings.seed, number)),
                    limits=Limits(settings.turns, 60.0, None, 10_000),
                )
            )
            cpu, wall = time.process_time() - cpu_began, time.perf_counter() - began
            episodes = [episode for group in groups for episode in group.episodes]
            assert all(len(episode.turns) == settings.turns for episode in episodes)
            began = time.process_time()
            samples = make_samples(groups)
            samples_took = time.process_time() - began
            assert len(samples) == len(episodes), "the conversations were begun anew"
            began = time.process_time()
            for task in domain.train_tasks:
                chat.prompt(Opening((*task.messages, Message("user", "?")), domain.tools))
            openings_took = time.process_time() - began
            turns = len(episodes) * settings.turns
            for name, seconds, count in (
                ("turn_ms", wall, turns),
                ("turn_cpu_ms", cpu, turns),
                ("opening_ms", openings_took, settings.groups),
                ("samples_ms", samples_took, len(episodes)),
            ):
                figures[name].append(seconds / count * 1000)
    lengths = {"prompt_tokens": len(episodes[0].prompt_ids), "sequence_tokens": episodes[0].sequence_lengths[0]}
    medians = {name: statistics.median(values[1:]) for name, values in figures.items()}
    return {"settings": asdict(settings), "figures": {**medians, **lengths, "all_turn_ms": figures["turn_ms"]}}


if __name__ == "__main__":
    answer(lambda settings: measure(Settings(**settings)))
