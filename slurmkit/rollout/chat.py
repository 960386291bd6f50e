"""Between messages and tokens, by the model's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from jinja2 import TemplateError

from slurmkit.config.model import Policy, ToolParser
from slurmkit.envs.environment import Message, Opening, Tool
from slurmkit.errors import UserError
from slurmkit.generation.engine import Completion
from slurmkit.rollout.tool_calls import Reading, read_calls, recognised

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A conversation up to where the model's reply begins: `ids` are what the model is given.

    `added_ids` are those of them that no earlier turn of the sample has; all of them where a sample `is_new`. In
    `messages`, replies are whatever the model said, calls and all. `text` is what the template makes of them with the
    tools `shown` in place of all.
    """

    ids: tuple[int, ...]
    added_ids: tuple[int, ...]
    is_new: bool
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    shown: tuple[Tool, ...]
    text: str


def template_of(policy: Policy) -> str | None:
    """The text of the template in place of the model's own. UserError where its file cannot be read."""
    path = policy.tokenizer.chat_template
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"policy.tokenizer.chat_template {path}: cannot be read: {error}") from None


class Chat:
    """The tokenizer of one model."""

    @classmethod
    def of(cls, model_path: str | Path, policy: Policy) -> Self:
        """The tokenizer of a model that is trained, or judged, as this policy."""
        return cls(
            model_path,
            trust_remote_code=policy.trusts_remote_code,
            tool_parser=policy.generation.tool_parser,
            template=template_of(policy),
            template_kwargs=policy.tokenizer.chat_template_kwargs,
        )

    def __init__(
        self,
        model_path: str | Path,
        *,
        trust_remote_code: bool = False,
        tool_parser: ToolParser | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        if template is not None:
            self._tokenizer.chat_template = template
        if self._tokenizer.chat_template is None:
            raise UserError(f"policy.model_name: the tokenizer of {model_path} has no chat template")
        self._model_path = model_path
        self._template_kwargs = template_kwargs
        self._end = str(self._tokenizer.eos_token)
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)))
        self._tool_parser = tool_parser or recognised(self._template)
        # A group asks for the same prompt for each of its episodes.
        self._token_text = lru_cache(maxsize=65536)(self._decode)
        self.prompt = lru_cache(maxsize=1024)(self._opened)

    @property
    def _template(self) -> str:
        template = self._tokenizer.chat_template
        return str(template) if isinstance(template, str) else "".join(map(str, template.values()))

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation without tools up to where the model's reply begins."""
        return self.prompt(Opening(tuple(messages))).ids

    def _opened(self, opening: Opening) -> Prompt:
        """What the model is given first. UserError for tools that the prompt omits or whose calls cannot be read."""
        if opening.tools and self._tool_parser is None:
            raise UserError(
                f"policy.generation.tool_parser null: the chat template of {self._model_path} has tools called in no "
                "form that is known here: set it to hermes, llama3_json or nemotron, whichever the model writes"
            )
        text = self._text(opening.messages, opening.tools)
        if opening.tools and not any(tool.name in text for tool in opening.tools):
            raise UserError(
                f"policy.tokenizer.chat_template: the chat template of {self._model_path} writes no tools, so the "
                "model would never see those of the environment: set policy.tokenizer.chat_template to a file whose "
                "template writes them"
            )
        ids, shown = self._encoded(text), self._shown(opening, text)
        if shown != opening.tools:
            text = self._text(opening.messages, shown)
        return Prompt(ids, ids, True, opening.messages, opening.tools, shown, text)

    def _shown(self, opening: Opening, text: str) -> tuple[Tool, ...]:
        """The first tool alone where what follows an opening is the same as with all, and quicker made; else all."""
        few = opening.tools[:1]
        if few == opening.tools:
            return few
        said = Message("assistant", "Yes."), Message("tool", "No.", tool_call_id="call_0", name=few[0].name)
        try:
            short = self._text(opening.messages, few)
            long_after, short_after = (self._text((*opening.messages, *said), tools) for tools in (opening.tools, few))
        except UserError:
            return opening.tools
        begins_alike = long_after.startswith(text) and short_after.startswith(short)
        return few if begins_alike and long_after[len(text) :] == short_after[len(short) :] else opening.tools

    def said(self, completion: Completion) -> str:
        """All that a completion says, special tokens included, but for the token that ends it."""
        return self._decoded(completion).removesuffix(self._end)

    def read(self, completion: Completion, tools: Sequence[Tool], *, first: int) -> Reading:
        """A reply as the environment is to see it; `first` is the number of its first call.

        Without special tokens, but read with them: in some tokenizers the tags around calls are such.
        """
        if not tools or self._tool_parser is None:
            return Reading(completion.text)
        reading = read_calls(self.said(completion), self._tool_parser, [tool.name for tool in tools], first=first)
        content = self._special.sub("", reading.content) if reading.calls else completion.text
        return replace(reading, content=content)

    def after(self, prompt: Prompt, completion: Completion, answers: Sequence[Message]) -> Prompt:
        """What the model is given next, once it has replied and been answered.

        The tokens of before, those that were sampled, and then whatever the template writes after such a reply: its
        text is cut behind the reply, and only what follows is encoded. White space in the reply may be another in the
        template's text; it is the model's own that stays. Where the template writes anything else differently than
        before (Qwen3 leaves out thoughts of before the last question), a new sample begins with what it writes now.
        """
        said = self._decoded(completion)
        messages = (*prompt.messages, Message("assistant", said.removesuffix(self._end)), *answers)
        text = self._text(messages, prompt.shown)
        end = _end_of(said, text, len(prompt.text)) if text.startswith(prompt.text) else None
        if end is not None:
            # Behind the token that it follows, as some tokenizers treat the beginning of a text in their own way.
            ended, *added = self._encoded(self._end + text[end:])
            if ended == completion.token_ids[-1]:
                ids = (*prompt.ids, *completion.token_ids.tolist(), *added)
                return replace(prompt, ids=ids, added_ids=tuple(added), is_new=False, messages=messages, text=text)
        ids = self._encoded(text if prompt.shown == prompt.tools else self._text(messages, prompt.tools))
        return replace(prompt, ids=ids, added_ids=ids, is_new=True, messages=messages, text=text)

    def _decoded(self, completion: Completion) -> str:
        ids = completion.token_ids.tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """What the template writes, up to where a reply begins. UserError where it refuses."""
        try:
            text = self._tokenizer.apply_chat_template(
                [_as_templates_take_it(message) for message in messages],
                tools=[dict(tool.definition) for tool in tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **self._template_kwargs,
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"the chat template of {self._model_path} refuses a conversation of {roles}: {error}"
            ) from None
        return str(text)

    def _encoded(self, text: str) -> tuple[int, ...]:
        """Tokens of what the template wrote: a tokenizer that adds its own special tokens to plain text would train the
        model on prompts that nobody will ever send it."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def save(self, folder: Path) -> None:
        """Write the tokenizer beside a model's weights."""
        self._tokenizer.save_pretrained(folder)

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a reply that somebody else wrote, with the token that ends it."""
        return (*self._encoded(text), self._tokenizer.eos_token_id)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, special tokens included.

        Where a character takes several tokens, the last of them has it and those before it have "".
        """
        texts, pending = list[str](), tuple[int, ...]()
        for place, token in enumerate(ids, 1):
            pending = (*pending, token)
            text = self._token_text(pending)
            # UTF-8 takes four bytes at most, and a token holds one at least.
            is_open = text.endswith("\ufffd") and len(pending) < 4 and place < len(ids)
            texts.append("" if is_open else text)
            pending = pending if is_open else ()
        return texts

    def _decode(self, ids: tuple[int, ...]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text: str = self._tokenizer.decode(list(ids), **options)
        # SentencePiece's tokenizers take a text's first space away.
        first = str(self._tokenizer.convert_ids_to_tokens(ids[0]))
        return f" {text}" if first.startswith("\u2581") and not text.startswith(" ") else text


def _as_templates_take_it(message: Message) -> dict[str, Any]:
    taken: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        taken["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        taken |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return taken


def _end_of(said: str, text: str, start: int) -> int | None:
    """Where `said`, which stands in `text` from `start` on but for white space, ends there; None if it does not."""
    wanted, found = "".join(said.split()), list[str]()
    left = len(wanted)
    for word in _WORD.finditer(text, start):
        found.append(word[0][:left])
        left -= len(found[-1])
        if not left:
            return word.start() + len(found[-1]) if "".join(found) == wanted else None
    return None
