"""Between messages and tokens, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from slurmkit.envs.environment import Message
from slurmkit.errors import UserError


class Chat:
    """The tokenizer of one model."""

    def __init__(self, model_path: str | Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        if self._tokenizer.chat_template is None:
            raise UserError(f"policy.model_name: the tokenizer of {model_path} has no chat template")

        # A group asks for the same prompt for each of its episodes.
        self._prompt_ids = lru_cache(maxsize=4096)(self._render)
        self._text = lru_cache(maxsize=65536)(self._decode)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation up to where the model's reply begins.

        By the template, never by encoding text: a tokenizer that adds its own special tokens to plain text would
        train the model on prompts that nobody will ever send it.
        """
        return self._prompt_ids(tuple(messages))

    def _render(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        return tuple(
            self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer beside a model's weights."""
        self._tokenizer.save_pretrained(folder)

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a reply that somebody else wrote, with the token that ends it."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, self._tokenizer.eos_token_id)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, special tokens included.

        Where a character takes several tokens, the last of them has it and those before it have "".
        """
        texts, pending = list[str](), tuple[int, ...]()
        for place, token in enumerate(ids, 1):
            pending = (*pending, token)
            text = self._text(pending)
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
