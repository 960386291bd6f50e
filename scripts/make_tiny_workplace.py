#!/usr/bin/env python3
"""Make what examples/grpo_workplace_tiny.yaml trains on: tasks, a tokenizer and a small model that calls tools badly.

usage: scripts/make_tiny_workplace.py [FOLDER]      results/workplace-tiny, unless said otherwise

The tasks are those of `slurmkit data workplace`. The tokenizer knows their words. The model, a Qwen3 of half a million
parameters, is shown whole conversations in which somebody does them, the tools' real answers included. One conversation
in six or so is as it should be; in the others an id is guessed that was to be looked up, or the work is left after the
look-up, or a value is any one. So it knows the forms and works as carelessly: what is right is up to GRPO. Nothing is
downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from slurmkit.envs.workplace.company import STATUSES, make_world
from slurmkit.envs.workplace.desk import Desk, as_text
from slurmkit.envs.workplace.families import Draft, call
from slurmkit.envs.workplace.generate import drafts, few_tools, write
from slurmkit.envs.workplace.scoring import Call
from slurmkit.envs.workplace.world import World

SEED = 1
# Those of which the company has thousands, so that no two of the three sets below share a task.
FAMILIES = ["status-depends", "create-task", "move-event"]
VALIDATION_TASKS, TASKS, DEMONSTRATED = 100, 1500, 4500
RIGHT = 0.18
# What tokens count that the model is not to say.
OTHERS = 0.05
STEPS, BATCH, RATE, WARM_UP = 1800, 16, 4e-3, 40
END = "<|end|>"
# Hermes' form, in few tokens: a tool is its name and its arguments' names.
TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(', ') }})\n{% endfor %}" + END + "{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def said(each: Call) -> str:
    """A call as the model is to write it."""
    return f'<tool_call>{{"name": "{each[0]}", "arguments": {each[1]}}}</tool_call>'


def spoiled(calls: Sequence[Call], rng: Random) -> list[Call]:
    """The calls as somebody careless makes them: without looking up what the last one needs, without the last one, or
    with any value in it."""
    name, arguments = calls[-1][0], json.loads(calls[-1][1])
    mistake = rng.choices(["guessed", "unfinished", "any value"], [4, 4, 2])[0]
    if mistake == "unfinished":
        return list(calls[:-1])
    guesses = {
        "customer_id": f"{rng.randrange(140):08}",
        "event_id": f"{rng.randrange(140):08}",
        "assigned_to_email": f"{json.loads(calls[0][1]).get('name', '').lower()}@larkfield.com",
    }
    values = {
        "new_value": rng.choice(STATUSES),
        "field": rng.choice(["event_start", "event_name", "duration"]),
        "board": rng.choice(["Back end", "Front end", "Design"]),
    }
    wrong, before = (guesses, []) if mistake == "guessed" else (values, list(calls[:-1]))
    key = next(key for key in wrong if key in arguments)
    return [*before, call(name, **{**arguments, key: wrong[key]})]


def conversation(
    draft: Draft, world: World, rng: Random, tokenizer: Any, *, right: float
) -> tuple[list[int], list[int]]:
    """Tokens of a demonstration, and 1 for those that the model is to say."""
    calls = list(draft.calls) if rng.random() < right else spoiled(draft.calls, rng)
    tools = [{"type": "function", "function": tool} for tool in few_tools(draft.calls)]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": draft.question}], tools=tools, add_generation_prompt=True, tokenize=False
    )
    parts, desk = [(text, 0)], Desk(world)
    for name, arguments in calls:
        found, _ = desk.answer(name, json.loads(arguments))
        parts += [(said((name, arguments)) + END, 1), (f"<|tool|>{as_text(found)}{END}<|assistant|>", 0)]
    parts.append((f"Done.{END}", 1))
    pieces = [(tokenizer(text, add_special_tokens=False)["input_ids"], mask) for text, mask in parts]
    return [i for ids, _ in pieces for i in ids], [mask for ids, mask in pieces for _ in ids]


def texts(draft: Draft, world: World) -> Iterator[str]:
    """All that is said in a task, in whatever order."""
    yield draft.question
    desk = Desk(world)
    for each in draft.calls:
        yield from (said(each), as_text(desk.answer(each[0], json.loads(each[1]))[0]))


def make_tokenizer(texts: Iterator[str]) -> Any:
    """Words, ids, pairs of digits and runs of signs: what is copied is the same few tokens wherever it stands."""
    core = Tokenizer(models.BPE())
    parts = pre_tokenizers.Split(Regex(r"\d{8}|\d{1,2}|[A-Za-z_]+|[^A-Za-z_\d]+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<tool_call>", "</tool_call>")])
    roles = ["<|tools|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token="<|pad|>",
        additional_special_tokens=roles,
        chat_template=TEMPLATE,
    )


def train(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    """Next-token prediction: of what the model is to say, and a little of the rest, as what repeats teaches to copy."""
    rng = Random(f"tiny workplace {SEED}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()
    for step in range(STEPS):
        batch = rng.sample(rows, BATCH)
        width = max(len(ids) for ids, _ in batch)
        ids_BT = torch.zeros(BATCH, width, dtype=torch.long)
        weights_BT = torch.zeros(BATCH, width)
        for b, (ids, mask) in enumerate(batch):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            weights_BT[b, : len(ids)] = torch.tensor(mask, dtype=torch.float32).clamp(min=OTHERS)
        # Padding on the right needs no attention mask: nothing that counts comes after it.
        hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        ids_BT, weights_BT = ids_BT[:, 1:], weights_BT[:, 1:]
        counts_BT = weights_BT > 0
        losses = cross_entropy(model.lm_head(hidden_BTH[counts_BT]), ids_BT[counts_BT], reduction="none")
        loss = (losses * weights_BT[counts_BT]).sum() / weights_BT.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (1 - 0.95 * step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def chance(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """How likely the model is to say all of what it is to say, in the mean: about the accuracy it starts with."""
    total = 0.0
    for ids, mask in rows:
        logits_TV = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        losses_T = cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")
        total += float((-(losses_T * torch.tensor(mask[1:])).sum()).exp())
    return total / len(rows)


def main(folder: Path) -> None:
    """Write train.jsonl, val.jsonl and model/ to `folder`."""
    torch.manual_seed(SEED)
    files = {"out": str(folder / "train.jsonl"), "validation": str(folder / "val.jsonl")}
    counts = {"tasks": TASKS, "validation_tasks": VALIDATION_TASKS, "seed": SEED, "world_seed": 0}
    write({**files, **counts, "families": FAMILIES, "few_tools": True})
    world, rng = make_world(0), Random(f"tiny workplace demonstrations {SEED}")
    # The first are those that are validated and trained on: they are not shown.
    kept = VALIDATION_TASKS + TASKS
    found = islice(drafts(world, FAMILIES, SEED), kept, kept + DEMONSTRATED)
    shown = [draft for _, draft in found]
    words = (text for draft in shown for text in texts(draft, world))
    tokenizer = make_tokenizer(words)
    rows = [conversation(draft, world, rng, tokenizer, right=RIGHT) for draft in shown]
    lengths = [len(ids) for ids, _ in rows]
    print(f"{len(tokenizer)} tokens; conversations of {sum(lengths) / len(lengths):.0f}, at most {max(lengths)}")
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 8) * 8,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=256,
            max_position_embeddings=768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{sum(each.numel() for each in model.parameters()) / 1e6:.2f} million parameters")
    train(model, rows)
    held_out = islice(drafts(world, FAMILIES, SEED), VALIDATION_TASKS)
    done = [conversation(draft, world, rng, tokenizer, right=1.0) for _, draft in held_out]
    print(f"does {chance(model, done):.2f} of the tasks that it was not shown as they should be done")
    unfinished = folder / ".model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.replace(unfinished, folder / "model")
    print(f"{folder / 'model'}: the model")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/workplace-tiny"))
