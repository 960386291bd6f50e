"""The engine for real models: vLLM's AsyncLLM, which runs in processes of its own beside this one."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slurmkit.config.model import VllmCfg
from slurmkit.errors import NodeFailure
from slurmkit.generation import vllm_worker
from slurmkit.generation.engine import Completion, Request, completion_of
from slurmkit.generation.http_server import Serving, serve
from slurmkit.generation.machine import use_gpus, use_interface_of
from slurmkit.generation.nameless import remove_names
from slurmkit.generation.shared_tensors import SharedTensors
from slurmkit.generation.weights import (
    SavedWeights,
    SharedWeights,
    StreamedWeights,
    Weights,
    check_digest,
    check_manifest,
)

_CPU_KV_CACHE_BYTES = 256 << 20


class VllmEngine:
    """An `Engine` whose calls overlap: requests may be submitted while others are under way."""

    def __init__(
        self,
        model_path: str,
        *,
        precision: str,
        max_total_length: int,
        max_batch_size: int,
        weight_version: int = 0,
        threads: int | None = None,
        device: str = "cpu",
        gpus: Sequence[str] = (),
        trust_remote_code: bool = False,
        address: str = "127.0.0.1",
        temporary: str | None = None,
        settings: VllmCfg | None = None,
        vllm_kwargs: Mapping[str, Any] = MappingProxyType({}),
        in_flight_weight_updates: bool = False,
        sleeps: bool = False,
        serving: Serving | None = None,
    ) -> None:
        """Start vLLM with the model of a folder. `max_total_length` counts prompt and completion, in tokens.

        `gpus` are those to use, as CUDA_VISIBLE_DEVICES names them, `address` is the node's own, `temporary` a folder
        that somebody removes. With `in_flight_weight_updates`, what is under way goes on with new weights; with
        `sleeps`, the GPU's memory can be given up for a while; with `serving`, it is asked over HTTP as well.
        ValueError where vLLM cannot run the model on this device.
        """
        settings = settings or VllmCfg()
        use_gpus(gpus)
        if threads is not None:
            threads = max(1, threads // (settings.tensor_parallel_size if device == "cpu" else 1))
        _prepare(device, threads, address, temporary)
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        if device == "cpu":
            _check_head_size(config)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm: Any = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                **_arguments(
                    settings,
                    vllm_kwargs,
                    on_cpu=device == "cpu",
                    model=model_path,
                    skip_tokenizer_init=serving is None,
                    trust_remote_code=trust_remote_code,
                    dtype=precision,
                    max_model_len=max_total_length,
                    max_num_seqs=max_batch_size,
                    enable_sleep_mode=sleeps,
                )
            )
        )
        remove_names()
        self._sampling_params = SamplingParams
        self._model_path = model_path
        self._address = address
        self._serving = serving
        self._settings = settings
        self._server: asyncio.Task[None] | None = None
        self._in_flight = in_flight_weight_updates
        # Only who is told of each token at once knows which weights it is of.
        self._output_kind = RequestOutputKind.DELTA if in_flight_weight_updates else RequestOutputKind.FINAL_ONLY
        self._tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self._eos_id = int(self._tokenizer.eos_token_id)
        with torch.device("meta"):
            blank = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self._manifest = blank.state_dict()
        self._max_total_length = max_total_length
        self._version = weight_version
        self._shared = SharedTensors()
        self._finished: dict[int, Completion] = {}
        self._failure: Exception | None = None
        self._changed = asyncio.Event()
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._sampling: set[asyncio.Future[None]] = set()
        self._may_begin = asyncio.Event()
        self._may_begin.set()
        self._is_asleep = False

    async def start(self) -> None:
        if self._serving is not None:
            self._server = await serve(
                self._llm,
                self._serving,
                model_path=self._model_path,
                address=self._address,
                settings=self._settings,
                version=lambda: self._version,
            )

    async def submit(self, requests: Mapping[int, Request]) -> None:
        for ticket, request in requests.items():
            self._under_way[ticket] = task = asyncio.create_task(self._follow(ticket, request))
            # Not by the task itself: one that is cancelled at once never runs.
            task.add_done_callback(lambda _, ticket=ticket: self._under_way.pop(ticket))  # type: ignore[misc]

    async def collect(self) -> dict[int, Completion]:
        await self._changed.wait()
        self._changed.clear()
        finished, self._finished = self._finished, {}
        if self._failure is not None:
            raise self._failure
        return finished

    async def abort(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if (task := self._under_way.get(ticket)) is not None:
                task.cancel()  # on which AsyncLLM aborts its request
        self._changed.set()

    async def connect(
        self, way: str, address: str, port: int, first_rank: int, size: int, timeout_seconds: float
    ) -> None:
        told = (way, address, port, first_rank, size, timeout_seconds)
        try:
            await self._llm.collective_rpc("slurmkit_connect", args=told)
        except Exception as error:
            raise _named(error) from error

    async def load(self, weights: Weights | SharedWeights | SavedWeights | StreamedWeights) -> list[str]:
        if isinstance(weights, Weights):
            check_manifest(self._manifest, weights.tensors)
            table = self._shared.write(weights.tensors)
            weights = SharedWeights(weights.version, self._shared.path, table, weights.digest)
        else:
            check_manifest(self._manifest, {entry.name: entry for entry in weights.table})
        told: tuple[Any, ...]
        if isinstance(weights, StreamedWeights):
            told = ("streamed", "", weights.table, weights.wants_digest)
        else:
            way = "shared" if isinstance(weights, SharedWeights) else "saved"
            told = (way, weights.path, weights.table, weights.digest is not None)
        try:
            async with self._nothing_sampled():
                digests = [each for each in await self._llm.collective_rpc("slurmkit_load", args=told) if each]
                if not isinstance(weights, StreamedWeights):
                    for arrived in digests:
                        check_digest(weights, arrived)
                # What it holds was computed with the old weights.
                await self._llm.reset_prefix_cache()
                self._version = weights.version
        except Exception as error:
            if (named := _named(error)) is error:
                raise
            raise named from error
        return digests

    async def sleep(self) -> None:
        """Give up the GPU's memory: weights go to the CPU's, the cache is forgotten. Requests have to wait."""
        self._may_begin.clear()
        self._is_asleep = True
        await self._llm.sleep(level=1, mode="wait")

    async def wake(self, what: str) -> None:
        """Have a part of the memory back, `weights` or `kv_cache`, with which requests go on."""
        if await self._llm.wake_up([what]):
            self._is_asleep = False
            self._may_begin.set()

    @asynccontextmanager
    async def _nothing_sampled(self) -> AsyncIterator[None]:
        """What is under way is finished, or with in-flight updates halted, before this begins; the rest waits."""
        if self._is_asleep:
            yield  # to resume would be to sample without a cache
            return
        self._may_begin.clear()
        # Of what comes over HTTP, vLLM alone knows.
        is_halted = self._serving is not None or (self._in_flight and bool(self._sampling))
        try:
            if is_halted:
                # With nothing left in the cache, what was computed with the old weights is computed again.
                await self._llm.pause_generation(mode="keep" if self._in_flight else "wait", clear_cache=True)
            elif self._sampling:
                await asyncio.wait(self._sampling)
            yield
        finally:
            if is_halted:
                await self._llm.resume_generation()
            self._may_begin.set()

    async def _follow(self, ticket: int, request: Request) -> None:
        """One request from its start to its end; its failure is the engine's."""
        done = asyncio.get_running_loop().create_future()
        try:
            await self._may_begin.wait()
            self._sampling.add(done)
            self._finished[ticket] = await self._complete(ticket, request)
        except Exception as error:
            self._failure = _named(error)
        finally:
            self._sampling.discard(done)
            done.set_result(None)
        self._changed.set()

    async def _complete(self, ticket: int, request: Request) -> Completion:
        room = self._max_total_length - len(request.prompt_ids)
        if room < 1:
            return completion_of(self._tokenizer, [], [], "prompt_too_long", self._version)
        sampling = request.sampling
        most = min(sampling.max_new_tokens, room)
        params = self._sampling_params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            seed=sampling.seed % 2**63,
            max_tokens=most,
            min_tokens=min(sampling.min_new_tokens, most),
            logprobs=0,
            stop_token_ids=[self._eos_id, *sampling.stop_token_ids],
            ignore_eos=True,  # of what the model's folder calls so
            detokenize=False,
            output_kind=self._output_kind,
        )
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        token_ids, logprobs, versions, reason = list[int](), list[float](), list[int](), None
        async for output in self._llm.generate(prompt, params, request_id=str(ticket)):
            found = output.outputs[0]
            token_ids += found.token_ids
            logprobs += (known[token].logprob for token, known in zip(found.token_ids, found.logprobs, strict=True))
            versions += [self._version] * len(found.token_ids)
            reason = found.finish_reason
        if reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request with {reason}")
        return completion_of(self._tokenizer, token_ids, logprobs, reason, versions)


def _named(error: Exception) -> Exception:
    """NodeFailure where the error says that vLLM's processes are gone."""
    is_dead = type(error).__name__ == "EngineDeadError"
    return NodeFailure(f"vLLM's processes died: {error}") if is_dead else error


def _check_head_size(config: Any) -> None:
    """vLLM itself would only fail when it first samples, and without saying this."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in (sizes := CPUAttentionBackend.get_supported_head_sizes()):
        raise ValueError(
            f"the model's attention heads are {size} wide (head_dim): on a CPU, vLLM has kernels for "
            f"{', '.join(map(str, sizes))}; the torch engine (policy.generation.backend) takes any"
        )


def _arguments(settings: VllmCfg, added: Mapping[str, Any], *, on_cpu: bool, **given: Any) -> dict[str, Any]:
    """What vLLM is started with: what is given, what slurmkit chooses, and what the user adds."""
    return {
        **given,
        "logprobs_mode": "processed_logprobs",
        # Nothing that the model's folder says of sampling changes what is asked for.
        "generation_config": "vllm",
        "worker_extension_cls": f"{vllm_worker.__name__}.{vllm_worker.WorkerExtension.__name__}",
        "distributed_executor_backend": _executor(on_cpu, settings.tensor_parallel_size),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        # After a part of a prompt, vLLM takes back what the request's own random numbers have gone on by, which only
        # those of a GPU can: on a CPU it would die of it.
        "enable_chunked_prefill": False if on_cpu else None,
        **added,
    }


def _executor(on_cpu: bool, tensor_parallel_size: int) -> str:
    """Where vLLM's workers run.

    One on a CPU runs in the process that schedules for it: that would otherwise wait for it by spinning, on a core that
    the worker could use. vLLM's word "uni" means another thing on a CPU, the executor's name does not.
    """
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor" if on_cpu and tensor_parallel_size == 1 else "mp"


def _prepare(device: str, threads: int | None, address: str, temporary: str | None) -> None:
    """The environment that vLLM and its processes read when they start; what the user has set stays."""
    use_interface_of(address)
    os.environ[vllm_worker.ENGINE_PROCESS] = str(os.getpid())
    if temporary is not None:
        # Sockets and files that nobody removes where an engine is killed. Short, as a socket's path has 107 characters.
        os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = tempfile.tempdir = temporary
    defaults = {
        "VLLM_HOST_IP": address,
        # Bound, the threads of two engines on one machine would have the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Threads that spin while they wait take the cores that policy and driver need.
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_NO_USAGE_STATS": "1",
        # Small functions that are compiled on a CPU gain nothing and need a C++ compiler.
        **({"TORCH_COMPILE_DISABLE": "1"} if device == "cpu" else {}),
        # Its warnings are of what slurmkit has chosen; each load repeats one.
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
