"""The sharded policy: real processes with gloo between them. Shapes: B sequences, T positions."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_model, tiny_config
from torch import distributed
from transformers import AutoModelForCausalLM

from slurmkit.generation.engine import Request, SamplingParams
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.grpo.batch import optimizer_steps
from slurmkit.grpo.loss import token_logprobs
from slurmkit.grpo.policy import PolicyWorker
from slurmkit.rollout.sample import Sample

# With Adam's usual 1e-8 an entry whose gradient is rounding noise moves by a whole learning rate.
OPTIMIZER = {"kwargs": {"lr": 1e-2, "eps": 1e-3}}


def a_sample(length: int, advantage: float) -> Sample:
    return Sample(
        token_ids=tuple(range(40, 41 + length)),
        loss_mask=(0, *[1] * length),
        logprobs=(0.0, *[-5.5] * length),
        advantage=(0.0, *[advantage] * length),
        group_id=0,
        rollout_id=0,
        temperature=1.0,
        weight_version=0,
        finish_reason="stop",
    )


# Uneven lengths, a rank with less than the others, and in the second round a rank with nothing at all.
ROUNDS = [[a_sample(9, 1.0), a_sample(2, -1.0), a_sample(5, 0.5)], [a_sample(4, 1.0)], [a_sample(3, -1.0)]]


def train(rank: int, num_ranks: int, model_path: str, resume: str | None, first: int, folder: Path, ports: Any) -> None:
    """One rank: rounds from `first` on, saving before the last one; rank 0 leaves results in `folder`."""
    policy = {
        "model_name": model_path,
        "from_scratch": None,
        "train_micro_batch_size": 1,
        "optimizer": OPTIMIZER,
        "max_grad_norm": 1e9,
    }
    worker = PolicyWorker(tiny_config(folder, policy=policy), rank, num_ranks, threads=1)
    if rank == 0:
        port = worker.open_store("127.0.0.1")
        for _ in range(num_ranks - 1):
            ports.put(port)
    else:
        port = ports.get(timeout=60)
    worker.join("127.0.0.1", "127.0.0.1", port)
    worker.load(f"{resume}/model" if resume else model_path, f"{resume}/optimizer.pt" if resume else None, first)
    norms = []
    for index in range(first, len(ROUNDS)):
        if index == len(ROUNDS) - 1:
            worker.save(str(folder / "saved"))
        (step,) = optimizer_steps(ROUNDS[index], global_batch_size=4, micro_batch_size=1, num_ranks=num_ranks)
        norms.append(worker.update(step.ranks[rank], step.num_valid_tokens).grad_norm)
    weights = worker.gather_weights()
    if weights is not None:
        torch.save({"norms": norms, "weights": dict(weights.tensors)}, folder / "result.pt")


def run_ranks(num_ranks: int, model_path: Path, folder: Path, resume: Path | None = None, first: int = 0) -> Any:
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    processes = [
        context.Process(
            target=train,
            args=(rank, num_ranks, str(model_path), resume and str(resume), first, folder, ports),
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return torch.load(folder / "result.pt")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def two_ranks(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, run_ranks(2, model_path, folder)


@pytest.fixture(scope="module")
def one_rank(model_path: Path, two_ranks: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Alone from the start, in this process, and with the engine's view of the same weights."""
    folder = tmp_path_factory.mktemp("one")
    train(0, 1, str(model_path), None, 0, folder, queue.Queue())
    distributed.destroy_process_group()
    return dict(torch.load(folder / "result.pt"))


def test_two_ranks_with_uneven_and_empty_shares_train_as_one(
    two_ranks: tuple[Path, Any], one_rank: dict[str, Any], model_path: Path
) -> None:
    _, both = two_ranks
    assert both["norms"] == pytest.approx(one_rank["norms"], rel=1e-4)
    before = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).state_dict()
    assert both["weights"].keys() == one_rank["weights"].keys() == before.keys()
    for name, tensor in one_rank["weights"].items():
        torch.testing.assert_close(both["weights"][name], tensor, atol=1e-5, rtol=1e-4)
    assert any((one_rank["weights"][name] - before[name]).abs().max() > 1e-3 for name in before)


def test_another_number_of_ranks_goes_on_from_what_two_have_saved(
    two_ranks: tuple[Path, Any], model_path: Path, tmp_path: Path
) -> None:
    folder, both = two_ranks
    alone = run_ranks(1, model_path, tmp_path / "alone", resume=folder / "saved", first=len(ROUNDS) - 1)
    assert alone["norms"] == pytest.approx(both["norms"][-1:], rel=1e-4)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(tensor, both["weights"][name], atol=1e-5, rtol=1e-4)


def test_an_engine_with_the_saved_weights_has_the_policys_logprobs(two_ranks: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = two_ranks
    make_tiny_model(tmp_path / "model").rename(tmp_path / "tokenizer")  # a policy saves no tokenizer
    model = AutoModelForCausalLM.from_pretrained(folder / "saved" / "model", dtype=torch.float32)
    model.save_pretrained(tmp_path / "tokenizer")
    engine = TorchEngine(str(tmp_path / "tokenizer"), precision="float32", max_total_length=64, max_batch_size=8)
    (completion,) = engine.generate([Request((40, 41), SamplingParams(0.8, 20, seed=3))])
    ids_BT = torch.tensor([[40, 41, *completion.token_ids]])
    with torch.inference_mode():
        logprobs_BT = token_logprobs(model(input_ids=ids_BT).logits, ids_BT, temperature=0.8)
    assert completion.logprobs == pytest.approx(logprobs_BT[0, 2:].tolist(), abs=1e-5)
