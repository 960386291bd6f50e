"""Policy ranks as real processes with gloo between them, which do a few rounds of training."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy
import torch
from torch import distributed

from slurmkit.config.model import Policy
from slurmkit.config.schema import TrainConfig
from slurmkit.grpo.batch import optimizer_steps, pack
from slurmkit.grpo.policy_worker import PolicyWorker
from slurmkit.rollout.sample import Sample
from tests.support.tiny_model import tiny_config

# With Adam's usual 1e-8 an entry whose gradient is rounding noise moves by a whole learning rate.
OPTIMIZER = {"kwargs": {"lr": 1e-2, "eps": 1e-3}}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["slurmkit.grpo.policy_worker", "slurmkit.grpo.adapters", "tests.support.tiny_model"])


def a_sample(length: int, advantage: float, *, trained: bool = True) -> Sample:
    """A token that is given and `length` that were sampled."""
    mask = numpy.arange(length + 1) > (0 if trained else length)
    return Sample(
        token_ids=numpy.arange(40, 41 + length, dtype=numpy.int32),
        loss_mask=mask,
        logprobs=numpy.where(mask, numpy.float32(-5.5), numpy.float32(0)),
        advantage=numpy.where(mask, numpy.float32(advantage), numpy.float32(0)),
        group_id=0,
        rollout_id=length,
        temperature=1.0,
        weight_version=0,
        finish_reason="stop",
    )


# Uneven lengths, a rank with less than the others, and in the second round a rank with nothing at all.
ROUNDS = (
    (a_sample(9, 1.0), a_sample(2, -1.0), a_sample(5, 0.5)),
    (a_sample(4, 1.0), a_sample(3, 1.0, trained=False)),
    (a_sample(3, -1.0),),
)


@dataclass(frozen=True)
class Work:
    """What the ranks do: the rounds from `first` on, saving before the last of them."""

    folder: Path
    model_path: Path
    policy: dict[str, Any] = field(default_factory=dict)
    loss_fn: dict[str, Any] = field(default_factory=dict)
    tensor_parallel_size: int = 1
    num_nodes: int = 1
    starting_path: Path | None = None
    checkpoint: Path | None = None
    first: int = 0
    rounds: Sequence[Sequence[Sample]] = ROUNDS
    score: tuple[str, ...] = ()
    rests: bool = False
    """The ranks give up their devices' memory after each update, and have it again before the next."""
    reference: bool = False
    """Samples have a reference's logprobs, as the loss wants them."""

    @property
    def saved(self) -> Path:
        return self.folder / "saved"

    @property
    def config(self) -> TrainConfig:
        policy = {
            "model_name": str(self.model_path),
            "from_scratch": None,
            "train_micro_batch_size": 1,
            "optimizer": OPTIMIZER,
            "max_grad_norm": 1e9,
        } | self.policy
        config = tiny_config(
            self.folder,
            policy=policy,
            loss_fn=self.loss_fn,
            cluster={"gpus_per_node": 0, "num_nodes": self.num_nodes, "call_timeout_seconds": 30.0},
        )
        # On CPUs a run has one rank per node, and tensor parallel is for neighbours in a node.
        found = config.policy.model_dump()
        found["dtensor_cfg"]["tensor_parallel_size"] = self.tensor_parallel_size
        sections = {name: getattr(config, name) for name in TrainConfig.model_fields}
        return TrainConfig.model_construct(**sections | {"policy": Policy.model_validate(found)})


def train(work: Work, rank: int, num_ranks: int, ports: Any) -> None:
    """One rank; rank 0 leaves results in the work's folder."""
    config = work.config
    worker = PolicyWorker(config, rank, num_ranks, threads=1)
    if rank == 0:
        port = worker.open_store("127.0.0.1")
        for _ in range(num_ranks - 1):
            ports.put(port)
    else:
        port = ports.get(timeout=60)
    worker.join("127.0.0.1", "127.0.0.1", port)
    starting = work.starting_path and str(work.starting_path)
    worker.load(str(work.model_path), starting, work.checkpoint and str(work.checkpoint), work.first)
    results, error = [], ""
    for index in range(work.first, len(work.rounds)):
        if index == len(work.rounds) - 1:
            worker.save(str(work.saved))
            while rank == 0 and worker.written() is None:
                sleep(0.01)
        samples = list(work.rounds[index])
        if work.reference:
            samples = [replace(sample, reference_logprobs=sample.logprobs) for sample in samples]
        (step,) = optimizer_steps(
            samples,
            global_batch_size=4,
            micro_batch_tokens=10,
            num_ranks=num_ranks // work.tensor_parallel_size,
            loss_fn=config.loss_fn,
        )
        try:
            if work.rests and index > work.first:
                worker.wake()
            results.append(worker.update(step.ranks[rank // work.tensor_parallel_size], index + 1))
            if work.rests:
                worker.rest()
        except FloatingPointError as raised:
            error = str(raised)
    losses = torch.tensor([result.sums.loss for result in results], dtype=torch.float64)
    distributed.all_reduce(losses)
    whole = pack([(sample, 0.0) for sample in ROUNDS[0]])
    scores = {of: torch.from_numpy(worker.logprobs([whole], of)[0]) for of in work.score}  # type: ignore[arg-type]
    weights = worker.gather_weights()
    if weights is not None:
        found = {
            "losses": (losses / work.tensor_parallel_size).tolist(),
            "norms": [result.grad_norm for result in results],
            "error": error,
            "seconds": results[-1].seconds if results else {},
            "peak_memory_gib": results[-1].peak_memory_gib if results else 0,
            "lrs": [result.lr for result in results],
            "weights": dict(weights.tensors),
            "scores": scores,
        }
        torch.save(found, work.folder / "result.pt")
    # Threads of gloo, which FSDP's groups still hold, now and then abort the interpreter as it ends.
    os._exit(0)


def run_ranks(num_ranks: int, work: Work) -> dict[str, Any]:
    """What rank 0 left."""
    work.folder.mkdir()
    ports = _context.Queue()
    processes = [_context.Process(target=train, args=(work, rank, num_ranks, ports)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return dict(torch.load(work.folder / "result.pt"))


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same losses, norms and weights but for rounding."""
    count = len(found["norms"])
    torch.testing.assert_close(found["losses"], expected["losses"][-count:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["norms"], expected["norms"][-count:], atol=1e-5, rtol=1e-4)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
