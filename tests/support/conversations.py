"""Real chat templates over tokenizers that make mistakes visible, and engines and environments that follow a script."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from slurmkit.envs.environment import Message, Opening, Score, Task, Tool
from slurmkit.generation.engine import Completion, FinishReason, SamplingParams
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.episode import Episode, Limits, run_episode
from tests.support.requirements import REPOSITORY

TEMPLATES = REPOSITORY / "tests" / "rollout" / "templates"
ENDS = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "nemotron_nano_v2": "<SPECIAL_12>"}
_OTHERS = {
    "qwen3": ["<|im_start|>"],
    "llama3_1": ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"],
    "nemotron_nano_v2": ["<SPECIAL_10>", "<SPECIAL_11>"],
}
# Pieces that are merged across what the templates write and what is said.
_CORPUS = [
    "hello\nuser\n",
    "\n\n<tool_response>\n",
    ">\nhello",
    "hello world assistant\n",
    '{"name": "',
    "</think>\n\n",
]
PLENTY = Limits(max_turns=10, call_seconds=5, episode_seconds=None, max_answer_chars=10_000)


@dataclass(frozen=True)
class Talk:
    """A model's chat, and its tokenizer beside it."""

    chat: Chat
    tokenizer: Any
    end: str

    def byte_ids(self, text: str) -> list[int]:
        """Tokens of a reply as no encoder would choose them: byte by byte, but for special tokens other than its end,
        which it can only spell."""
        names = [name for name in self.tokenizer.all_special_tokens if name != self.end]
        special = "|".join(map(re.escape, names))
        ids = list[int]()
        for piece in re.split(f"({special})", text):
            if piece in names:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)
                ids += [self.tokenizer.convert_tokens_to_ids(letter) for letter in "".join(word for word, _ in letters)]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def written(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """What the template makes of messages whose replies are whatever was said."""
        taken: list[dict[str, Any]] = []
        for message in messages:
            taken.append({"role": message.role, "content": message.content})
            if message.role == "tool":
                taken[-1] |= {"tool_call_id": message.tool_call_id, "name": message.name}
        given = [dict(tool.definition) for tool in tools] or None
        return str(self.tokenizer.apply_chat_template(taken, tools=given, add_generation_prompt=True, tokenize=False))


def make_talk(folder: Path, template: str, *, adds_bos: bool = False, special: Sequence[str] = (), **chat: Any) -> Talk:
    """A tokenizer of bytes and some merges that bring whole replies together, with a real template.

    `adds_bos`: to plain text, before it; `special` are further special tokens.
    """
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1, show_progress=False
    )
    model.train_from_iterator(_CORPUS, trainer)
    tokens = ["<bos>", ENDS[template], *_OTHERS[template], *special]
    model.add_special_tokens(tokens)
    if adds_bos:
        model.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", model.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<bos>",
        eos_token=ENDS[template],
        additional_special_tokens=tokens[2:],
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
    )
    tokenizer.save_pretrained(folder)
    return Talk(Chat(folder, **chat), tokenizer, ENDS[template])


def tool(name: str) -> Tool:
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": []}
    return Tool({"type": "function", "function": {"name": name, "description": f"{name}s", "parameters": parameters}})


@dataclass
class Engine:
    """Says what is written down, byte by byte, and remembers what it was given.

    Every token has a logprob that no other has.
    """

    talk: Talk
    replies: list[str]
    cut: Sequence[int] = ()
    """Numbers of the replies that are cut: they have no end."""
    room: int = 1 << 30
    seconds: float = 0.0
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)
    given: list[Completion] = field(default_factory=list)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        await asyncio.sleep(self.seconds)
        number = len(self.asked)
        is_cut = number in self.cut
        ids = self.talk.byte_ids(self.replies[number]) + ([] if is_cut else [self.talk.tokenizer.eos_token_id])
        reason: FinishReason = "length" if is_cut else "stop"
        if len(prompt_ids) >= self.room:
            ids, reason = [], "prompt_too_long"
        self.asked.append((prompt_ids, sampling))
        logprobs = [-float(next(self.numbers)) for _ in ids]
        self.given.append(
            Completion(
                numpy.array(ids, numpy.int32),
                numpy.array(logprobs, numpy.float32),
                str(self.talk.tokenizer.decode(ids, skip_special_tokens=True)),
                reason,
                numpy.zeros(len(ids), numpy.int32),
            )
        )
        return self.given[-1]


@dataclass
class Scripted:
    """An environment that answers as is written down and remembers what it was told."""

    opening: Opening
    answers: Sequence[Sequence[Message]] = ()
    seconds: float = 0.0
    heard: list[Message] = field(default_factory=list)
    scored: int = 0

    async def start(self, task: Task) -> Opening:
        return self.opening

    async def step(self, reply: Message) -> Sequence[Message]:
        self.heard.append(reply)
        await asyncio.sleep(self.seconds)
        return self.answers[len(self.heard) - 1] if len(self.heard) <= len(self.answers) else ()

    async def score(self) -> Score:
        self.scored += 1
        return Score(1.0, True)


def play(talk: Talk, engine: Engine, environment: Scripted, limits: Limits = PLENTY) -> Episode:
    task = Task("a task", "?", "")
    return asyncio.run(run_episode(task, environment, engine, talk.chat, SamplingParams(1.0, 99, 7), limits))
