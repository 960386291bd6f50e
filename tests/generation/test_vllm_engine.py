"""What only vLLM's engine has: requests that overlap, processes of its own, models that it cannot run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from slurmkit.config.model import Generation, VllmCfg
from slurmkit.errors import NodeFailure
from slurmkit.generation import channels
from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.shared_tensors import lay_out
from slurmkit.generation.vllm_engine import VllmEngine
from slurmkit.generation.weights import StreamedWeights, Weights
from tests.support.driver import all_end, nothing_left_behind
from tests.support.engines import Vllm
from tests.support.requirements import unchanged_environment
from tests.support.tiny_model import make_tiny_model

SETTINGS = {"precision": "float32", "max_total_length": 320, "max_batch_size": 8}
# Starts an engine where a folder of its own takes what vLLM writes, says so, and waits.
STARTS = """
import asyncio, sys
from slurmkit.config.model import VllmCfg
from slurmkit.generation.vllm_engine import VllmEngine
async def start():
    given = {"precision": "float32", "max_total_length": 64, "max_batch_size": 8}
    parallel = VllmCfg(tensor_parallel_size=int(sys.argv[3]))
    engine = VllmEngine(sys.argv[1], temporary=sys.argv[2], settings=parallel, **given)
    print("started", flush=True)
    await asyncio.sleep(600)
if __name__ == "__main__":
    asyncio.run(start())
"""


SHAPE = {"max_length": 320, "num_attention_heads": 1, "num_key_value_heads": 1}


def make_model(folder: Path) -> Path:
    return make_tiny_model(folder, **SHAPE)


def processes_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.vllm
def test_a_short_request_overtakes_a_long_one_and_a_dead_process_fails_it(tmp_path: Path) -> None:
    vllm = Vllm(make_model(tmp_path / "model"), **SETTINGS)
    # Greedy, so that the end token is unlikely to end it.
    long, short = Request((1, 2), SamplingParams(0.0, 310, 0)), Request((1, 2), SamplingParams(1.0, 2, 0))

    async def ask() -> list[dict[int, Completion]]:
        await vllm.engine.submit({0: long})
        await asyncio.sleep(0.05)
        await vllm.engine.submit({1: short})
        return [await vllm.engine.collect(), await vllm.engine.collect()]

    first, second = vllm.do(ask())
    assert list(first) == [1]
    assert list(second) == [0]

    async def forget() -> tuple[dict[int, Completion], bool]:
        await vllm.engine.submit({3: long})
        await asyncio.sleep(0.1)
        is_begun = vllm.engine._llm.output_processor.has_unfinished_requests()
        collecting = asyncio.ensure_future(vllm.engine.collect())
        await vllm.engine.abort([3])
        found = await collecting
        while vllm.engine._llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
        return found, is_begun

    began = time.monotonic()
    assert vllm.do(forget()) == ({}, True)
    assert time.monotonic() - began < 5

    async def ask_and_kill() -> None:
        await vllm.engine.submit({2: long})
        for process in processes_of(os.getpid()):
            if "EngineCor" in process.name():
                process.kill()
        await vllm.engine.collect()

    with pytest.raises(NodeFailure, match="vLLM's processes died"):
        vllm.do(ask_and_kill())
    with pytest.raises(NodeFailure, match="vLLM's processes died"):
        vllm.load(Weights(1, AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()))
    vllm.end()


@torch.inference_mode()
def logprobs_of(model: Path, request: Request, completion: Completion) -> torch.Tensor:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
    logprobs = torch.log_softmax(reference(input_ids=ids).logits[0], dim=-1)[len(request.prompt_ids) - 1 : -1]
    return logprobs.gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]


@pytest.mark.vllm
@pytest.mark.parametrize("in_flight", [True, False])
def test_running_requests_use_new_weights_only_with_in_flight_updates(tmp_path: Path, in_flight: bool) -> None:
    old, new = make_model(tmp_path / "old"), make_tiny_model(tmp_path / "new", seed=1, **SHAPE)
    weights = Weights(7, AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).state_dict())
    vllm = Vllm(old, **SETTINGS, in_flight_weight_updates=in_flight)
    # More than run at once.
    requests = [Request((1, 2, number), SamplingParams(1.0, 300, number)) for number in range(12)]

    async def ask() -> dict[int, Completion]:
        await vllm.engine.submit(dict(enumerate(requests)))
        await asyncio.sleep(0.3)
        loading = asyncio.ensure_future(vllm.engine.load(weights))
        await asyncio.sleep(0.01)
        await vllm.engine.submit({len(requests): requests[0]})  # while the weights come
        await vllm.engine.abort([1, 11])  # of which one is under way
        await loading
        found: dict[int, Completion] = {}
        kept = set(range(len(requests) + 1)) - {1, 11}
        while not kept <= found.keys():
            found |= await vllm.engine.collect()
        return {number: found[number] for number in kept}

    found = vllm.do(ask())
    kinds = set()
    for number, completion in found.items():
        request = requests[number % len(requests)]
        own = torch.from_numpy(completion.weight_versions) == 7
        expected = torch.where(own, logprobs_of(new, request, completion), logprobs_of(old, request, completion))
        assert completion.logprobs == pytest.approx(expected.numpy(), abs=1e-5)
        assert sorted(completion.weight_versions) == list(completion.weight_versions)
        kinds.add(frozenset(completion.weight_versions.tolist()))
    assert ({0, 7} in kinds) == in_flight, kinds
    vllm.end()


@pytest.mark.vllm
def test_a_two_process_engine_samples_as_one_before_and_after_streaming(tmp_path: Path) -> None:
    shape = SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    old, new = (make_tiny_model(tmp_path / str(seed), seed=seed, **shape) for seed in range(2))
    vllm = Vllm(old, **SETTINGS, settings=VllmCfg(tensor_parallel_size=2))
    requests = [Request((1, 2, number), SamplingParams(1.0, 20, number)) for number in range(8)]
    greedy = Request(tuple(range(200)), SamplingParams(0.0, 8, 0))

    def check(model: Path) -> None:
        for request, completion in zip(asked := [*requests, greedy], vllm.generate(asked), strict=True):
            assert completion.logprobs == pytest.approx(logprobs_of(model, request, completion).numpy(), abs=1e-5)
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = torch.tensor([greedy.prompt_ids])
        said = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert completion.token_ids.tolist() == said[0, ids.shape[1] :].tolist()

    check(old)
    state = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).state_dict()
    meeting = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]
    where: dict[str, Any] = {"size": 3, "timeout_seconds": 60}

    def send() -> str:
        channel = channels.connect("broadcast", "127.0.0.1", meeting.port, rank=0, device=torch.device("cpu"), **where)
        return channels.send(channel, lay_out(state), state.items(), torch.device("cpu"))

    with unchanged_environment(), ThreadPoolExecutor(1) as thread:
        sent = thread.submit(send)
        vllm.do(vllm.engine.connect("broadcast", "127.0.0.1", meeting.port, first_rank=1, **where))
        arrived = vllm.do(vllm.engine.load(StreamedWeights(7, lay_out(state), wants_digest=True)))
        assert arrived == [sent.result(60)] * 2
    check(new)  # the prompt that is remembered too
    vllm.load(Weights(8, AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32).state_dict()))
    check(old)
    vllm.end()


# Alone it runs in vLLM's scheduler's process, two have one each.
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.vllm
def test_an_engine_that_is_killed_leaves_no_process_and_no_file(tmp_path: Path, workers: int) -> None:
    shape = SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    model, script = make_tiny_model(tmp_path / "model", **shape), tmp_path / "start.py"
    script.write_text(STARTS)
    # Sockets lie there, and a socket's path is short.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary, nothing_left_behind():
        command = [sys.executable, script, model, temporary, str(workers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
            assert engine.stdout is not None
            assert "started\n" in iter(engine.stdout.readline, "")
            started = processes_of(engine.pid)
            assert len(started) > workers
            engine.kill()
        all_end(started)


def test_a_head_dim_without_a_kernel_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    message = r"heads are 16 wide \(head_dim\): on a CPU, vLLM has kernels for 32, 64, "
    with unchanged_environment(), pytest.raises(ValueError, match=message):
        VllmEngine(str(make_tiny_model(tmp_path / "model")), **SETTINGS)


def test_vllm_arguments_set_by_slurmkit_are_refused_with_the_right_key() -> None:
    with pytest.raises(ValueError, match=r"slurmkit sets max_num_seqs \(use policy.generation.max_batch_size\)"):
        Generation(vllm_kwargs={"max_num_seqs": 4, "block_size": 32})
