"""What to do about a key of NeMo RL that slurmkit does not have.

Keys of its GRPO configurations at commit 7ea279a, by their beginning: the longest one that fits a key is used.
"""

from __future__ import annotations

from typing import Any

_ALWAYS = "slurmkit always does this: leave it out"
_NEVER = "slurmkit does not have this feature: leave it out"
_VLLM = "give it to vLLM in policy.generation.vllm_kwargs"
_ENGINES = "the engines are torch and vLLM: set policy.generation.backend and policy.generation.vllm_cfg"
_PRECISION = "engines have the policy's type: use policy.precision"
_VALIDATION = "validation samples as training does: use policy.generation.temperature, top_p and top_k"
_GYM = "start NeMo Gym's servers yourself and name one in env.gym.url or env.gym.agent_url"
_PACKING = "sequences are always packed: use policy.sequence_packing.train_mb_tokens"
_SAME_FORWARD = "logprobs and training use the same micro-batches: use policy.train_micro_batch_size"
_ENVIRONMENT = "set variables with the job's env"
_WATCH = "use logger.wandb_enabled or logger.tensorboard_enabled"
_TASKS = "slurmkit reads tasks from files: use data.train.data_path, input_key and output_key"
_PROMPT = "slurmkit adds no prompt of its own: put it into the rows of data.train.data_path"
_QUANTIZED = "slurmkit trains without quantization: use policy.precision"

_DATASET = ("allowed_problem_types", "dataset_name", "download_dir", "env_name", "processor", "prompt_file")
_ADAM = ("exp_avg_dtype", "exp_avg_sq_dtype", "foreach", "fused", "master_weights", "store_param_remainders")
_PACKER = ("algorithm", "enabled", "fuse_loss", "logprob_mb_tokens", "microbatch_order", "sequence_length_round")
_QUANT = ("batch_size", "calib_data", "calib_size", "cfg", "sequence_length")

_ENVIRONMENTS = ("clevr-cogent", "geometry3k", "mmpr-tiny", "refcoco", "sliding_puzzle_game", "vlm")

_ADVICE = {
    "async_rl": "use grpo.async_grpo",
    "checkpointing.ft_keep_latest_k": "the latest checkpoint is always kept: leave it out",
    "checkpointing.ft_save_period": "use checkpointing.save_period; the latest checkpoint is always kept",
    "checkpointing.model_save_format": "checkpoints hold safetensors: leave it out",
    "checkpointing.save_consolidated": "model/ of a checkpoint is in Hugging Face's format: leave it out",
    "checkpointing.save_optimizer": _ALWAYS,
    "cluster.master_port_range_high": "free ports are found: leave it out",
    "cluster.master_port_range_low": "free ports are found: leave it out",
    "cluster.segment_size": "ask Slurm for it with the job's sbatch, as sbatch: {segment: 16}",
    "data.add_system_prompt": _PROMPT,
    "data.custom_dataloader": _TASKS,
    "data.dataset_name": _TASKS,
    "data.default": "give the keys to data.train and data.validation",
    "data.default.env_name": "use env.name",
    "data.default.prompt_file": _PROMPT,
    "data.default.system_prompt_file": _PROMPT,
    "data.max_input_seq_length": "use policy.max_total_sequence_length",
    "data.num_prompts_per_dataloader": "use data.train.weight",
    "data.num_workers": "tasks are read when the run starts: leave it out",
    "data.prompt_file": _PROMPT,
    **dict.fromkeys((f"data.train.{name}" for name in _DATASET), _TASKS),
    "data.train_jsonl_fpath": "use data.train.data_path",
    "data.use_multiple_dataloader": "give data.train as a list of sources, each with its weight",
    **dict.fromkeys((f"data.validation.{name}" for name in _DATASET), _TASKS),
    "data.validation.repeat": "use grpo.val_num_generations_per_prompt",
    "data.validation_jsonl_fpath": "use data.validation.data_path",
    "data_plane": _NEVER,
    "env.dapo": "use env.name math and env.math.num_workers",
    **dict.fromkeys((f"env.{name}" for name in _ENVIRONMENTS), "use env.name: arithmetic, math, workplace or gym"),
    "env.math.math_verify_impl": "answers are compared by math-verify: leave it out",
    "env.nemo_gym": _GYM,
    "env.reward_model": "slurmkit has no reward model: serve it behind a NeMo Gym server and name that in env.gym.url",
    "env.should_log_nemo_gym_responses": "use logger.num_val_transcripts and logger.num_train_samples",
    "env.should_mask_flagged_samples": "broken episodes are always left out: leave it out",
    "env.should_use_nemo_gym": "use env.name gym",
    "grpo.async_grpo.max_generation_failures": "use policy.generation.max_restarts",
    "grpo.async_grpo.recompute_kv_cache_after_weight_updates": _NEVER,
    "grpo.best_at_k_k": _NEVER,
    "grpo.best_at_k_m": _NEVER,
    "grpo.calculate_advantages_on_gpu": _NEVER,
    "grpo.combined_training_best_at_k_weight": _NEVER,
    "grpo.combined_training_pass_at_1_weight": _NEVER,
    "grpo.combined_training_weight_mode": _NEVER,
    "grpo.debug_payload_metrics": _NEVER,
    "grpo.deduplicate_multimodal_data": "slurmkit trains on text: leave it out",
    "grpo.dynamic_sampling_oversample_ratio": "use grpo.batch_multiplier",
    "grpo.invalid_tool_call_advantage": "give such episodes a lower reward in the environment",
    "grpo.invalid_tool_call_strategy": "give such episodes a lower reward in the environment",
    "grpo.malformed_thinking_advantage": "give such episodes a lower reward in the environment",
    "grpo.num_val_generations_per_prompt": "use grpo.val_num_generations_per_prompt",
    "grpo.penalize_invalid_tool_call": "give such episodes a lower reward in the environment",
    "grpo.penalize_malformed_thinking": "give such episodes a lower reward in the environment",
    "grpo.seq_logprob_error_threshold": "use loss_fn.truncated_importance_sampling_type seq-mask-tis with its bounds",
    "grpo.skip_reference_policy_logprobs_calculation": "use loss_fn.reference_policy_kl_penalty 0",
    "grpo.use_best_at_k": _NEVER,
    "grpo.use_combined_training": _NEVER,
    "grpo.val_batch_size": "validation plays all of its episodes together: use policy.generation.max_batch_size",
    "grpo.val_start_at": "use grpo.val_period",
    "grpo.zero_variance_prompt_filtering": "use grpo.use_dynamic_sampling",
    "logger.gpu_monitoring": "slurmkit logs perf: and train:peak_memory_gib itself: leave it out",
    "logger.mlflow": _WATCH,
    "logger.mlflow_enabled": _WATCH,
    "logger.monitor_gpus": "slurmkit logs perf: and train:peak_memory_gib itself: leave it out",
    "logger.num_val_samples_to_print": "use logger.num_val_transcripts, which keeps them in files",
    "logger.swanlab": _WATCH,
    "logger.swanlab_enabled": _WATCH,
    "logger.tensorboard": "use logger.tensorboard_enabled and logger.log_dir",
    "logger.wandb.log_nemo_gym_full_result_tables": "use logger.num_val_transcripts and logger.num_train_samples",
    "loss_fn.positive_example_nll_weight": _NEVER,
    "on_policy_distillation": _NEVER,
    "policy.activation_checkpointing_enabled": "use policy.dtensor_cfg.activation_checkpointing",
    "policy.disable_modelopt_layer_spec": _QUANTIZED,
    "policy.draft": "slurmkit trains no draft model: leave it out",
    "policy.dtensor_cfg._v2": "there is one implementation, FSDP2: leave it out",
    "policy.dtensor_cfg.automodel_kwargs": "models are transformers' own: leave it out",
    "policy.dtensor_cfg.clear_cache_every_n_steps": _NEVER,
    "policy.dtensor_cfg.context_parallel_size": "use policy.dtensor_cfg.tensor_parallel_size",
    "policy.dtensor_cfg.custom_parallel_plan": "transformers has the model's plan: leave it out",
    "policy.dtensor_cfg.defer_fsdp_grad_sync": _ALWAYS,
    "policy.dtensor_cfg.dp_replicate_size": "use policy.dtensor_cfg.hybrid_sharding",
    "policy.dtensor_cfg.enabled": "FSDP2 is the only way to shard: leave it out",
    "policy.dtensor_cfg.env_vars": _ENVIRONMENT,
    "policy.dtensor_cfg.expert_parallel_size": "use policy.dtensor_cfg.tensor_parallel_size",
    "policy.dtensor_cfg.lora_cfg.dropout_position": "dropout is before the adapters: leave it out",
    "policy.dtensor_cfg.lora_cfg.exclude_modules": "name the others in policy.dtensor_cfg.lora_cfg.target_modules",
    "policy.dtensor_cfg.lora_cfg.lora_A_init": "adapters begin as PEFT makes them: leave it out",
    "policy.dtensor_cfg.lora_cfg.use_triton": "adapters are PEFT's: leave it out",
    "policy.dtensor_cfg.moe_parallelizer": _NEVER,
    "policy.dtensor_cfg.sequence_parallel": "use policy.dtensor_cfg.tensor_parallel_size",
    "policy.dynamic_batching": _PACKING,
    "policy.generation.bad_words": _NEVER,
    "policy.generation.dynamo_cfg": _ENGINES,
    "policy.generation.mcore_generation_config": _ENGINES,
    "policy.generation.port_range_high": "free ports are found: leave it out",
    "policy.generation.port_range_low": "free ports are found: leave it out",
    "policy.generation.quant_cfg": _QUANTIZED,
    "policy.generation.real_quant": _QUANTIZED,
    "policy.generation.real_quant_export_cpu_offload": _QUANTIZED,
    "policy.generation.real_quant_ignore": _QUANTIZED,
    "policy.generation.refit_cfg": "use policy.generation.weight_transfer",
    "policy.generation.refit_transport": "use policy.generation.weight_transfer",
    "policy.generation.sglang_cfg": _ENGINES,
    "policy.generation.stop_strings": "use policy.generation.stop_token_ids",
    "policy.generation.trtllm_cfg": _ENGINES,
    "policy.generation.trtllm_kwargs": _ENGINES,
    "policy.generation.use_async_rollouts": _ALWAYS,
    "policy.generation.val_temperature": _VALIDATION,
    "policy.generation.val_top_k": _VALIDATION,
    "policy.generation.val_top_p": _VALIDATION,
    "policy.generation.vllm_cfg.async_engine": _ALWAYS,
    "policy.generation.vllm_cfg.cap_max_tokens_to_context": _ALWAYS,
    "policy.generation.vllm_cfg.enable_expert_parallel": _VLLM,
    "policy.generation.vllm_cfg.enable_prefix_caching": _VLLM,
    "policy.generation.vllm_cfg.enable_thinking": "use policy.tokenizer.chat_template_kwargs",
    "policy.generation.vllm_cfg.enable_vllm_metrics_logger": "slurmkit logs perf: and gen: itself: leave it out",
    "policy.generation.vllm_cfg.enforce_monotonicity": _NEVER,
    "policy.generation.vllm_cfg.env_vars": _ENVIRONMENT,
    "policy.generation.vllm_cfg.expert_parallel_size": "use policy.generation.vllm_cfg.tensor_parallel_size",
    "policy.generation.vllm_cfg.http_refit_api_key_env_var": "use policy.generation.weight_transfer",
    "policy.generation.vllm_cfg.http_refit_server_port": "use policy.generation.weight_transfer",
    "policy.generation.vllm_cfg.http_server_serving_chat_kwargs.chat_template": "use policy.tokenizer.chat_template",
    "policy.generation.vllm_cfg.http_server_serving_chat_kwargs.chat_template_content_format": "leave it to vLLM",
    "policy.generation.vllm_cfg.http_server_serving_chat_kwargs.default_chat_template_kwargs": (
        "use policy.tokenizer.chat_template_kwargs"
    ),
    "policy.generation.vllm_cfg.http_server_serving_chat_kwargs.reasoning_parser": _NEVER,
    "policy.generation.vllm_cfg.is_mx": _QUANTIZED,
    "policy.generation.vllm_cfg.kv_cache_dtype": _VLLM,
    "policy.generation.vllm_cfg.limit_mm_per_prompt": _VLLM,
    "policy.generation.vllm_cfg.load_format": _VLLM,
    "policy.generation.vllm_cfg.logprobs_mode": "training needs those of the distribution that was sampled from",
    "policy.generation.vllm_cfg.max_model_len": "use policy.max_total_sequence_length",
    "policy.generation.vllm_cfg.max_num_seqs": "use policy.generation.max_batch_size",
    "policy.generation.vllm_cfg.num_first_layers_in_bf16": _PRECISION,
    "policy.generation.vllm_cfg.num_last_layers_in_bf16": _PRECISION,
    "policy.generation.vllm_cfg.pipeline_parallel_size": "use policy.generation.vllm_cfg.tensor_parallel_size",
    "policy.generation.vllm_cfg.precision": _PRECISION,
    "policy.generation.vllm_cfg.quantization_ignored_layer_kws": _QUANTIZED,
    "policy.generation.vllm_cfg.reasoning_parser_plugin": _NEVER,
    "policy.generation.vllm_cfg.reset_encoder_cache_after_weight_update": "slurmkit trains on text: leave it out",
    "policy.generation.vllm_cfg.skip_tokenizer_init": _ALWAYS,
    "policy.generation.vllm_cfg.use_deep_gemm": _VLLM,
    "policy.generation.vllm_cfg.use_tqdm": _NEVER,
    "policy.generation.vllm_cfg.video": "slurmkit trains on text: leave it out",
    "policy.generation.vllm_cfg.vllm_kwargs": "use policy.generation.vllm_kwargs, as in NeMo RL",
    "policy.generation.vllm_cfg.vllm_metrics_logger_interval": "slurmkit logs perf: and gen: itself: leave it out",
    "policy.generation.vllm_cfg.zmq_refit_server_port": "use policy.generation.weight_transfer",
    "policy.generation_batch_size": "use policy.generation.max_batch_size",
    "policy.hf_config_overrides": "change config.json of the folder that policy.model_name names",
    "policy.is_vlm": "slurmkit trains on text: leave it out",
    "policy.logprob_batch_size": _SAME_FORWARD,
    "policy.make_sequence_length_divisible_by": "packed sequences need no padding: leave it out",
    "policy.megatron_cfg": "slurmkit has no Megatron backend: use policy.dtensor_cfg",
    "policy.megatron_cfg.activation_checkpointing": "use policy.dtensor_cfg.activation_checkpointing",
    "policy.megatron_cfg.env_vars": _ENVIRONMENT,
    "policy.megatron_cfg.optimizer": "use policy.optimizer",
    "policy.megatron_cfg.peft": "use policy.dtensor_cfg.lora_cfg",
    "policy.megatron_cfg.scheduler": "use policy.scheduler",
    "policy.megatron_cfg.tensor_model_parallel_size": "use policy.dtensor_cfg.tensor_parallel_size",
    "policy.offload_optimizer_for_logprob": "use policy.dtensor_cfg.cpu_offload",
    **dict.fromkeys((f"policy.optimizer.kwargs.{name}" for name in _ADAM), "AdamW is torch's, and fused: leave it out"),
    **dict.fromkeys((f"policy.quant_{name}" for name in _QUANT), _QUANTIZED),
    "policy.refit_buffer_size_gb": "use policy.generation.weight_transfer",
    "policy.router_replay": _NEVER,
    **dict.fromkeys((f"policy.sequence_packing.{name}" for name in _PACKER), _PACKING),
    "policy.tokenizer.name": "the tokenizer is that of policy.model_name: leave it out",
    "policy.tokenizer.use_fastokens": _NEVER,
    "policy.tokenizer.video": "slurmkit trains on text: leave it out",
    "reward_penalties": "give such episodes a lower reward in the environment",
}


def advice_on(key: str, value: Any) -> str | None:
    """Return what to do about a key that is NeMo RL's, None for any other. Example: ("policy.draft", {"enabled": 1}).

    Where the unknown key is a section with one key inside, the advice is on that key.
    """
    while isinstance(value, dict) and len(value) == 1:
        [(name, value)] = value.items()
        key = f"{key}.{name}"
    while key:
        if key in _ADVICE:
            return _ADVICE[key]
        key = key.rpartition(".")[0]
    return None
