"""The schema's own rules. How files and overrides become one configuration is tested beside the loader."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.algorithm import Grpo
from slurmkit.config.data import Data
from slurmkit.config.load import load_config
from slurmkit.config.model import Policy
from slurmkit.config.schema import Checkpointing, TrainConfig
from slurmkit.config.section import Section, ValidationError
from slurmkit.job.site import SiteFile
from slurmkit.job.spec import JobSpec
from tests.support.requirements import REPOSITORY
from tests.support.tiny_model import tiny_config

STOP = {"stop_at_validation_metric": "val:pass@3", "stop_at_validation_threshold": 0.5}
MAXRL = {"adv_estimator": {"name": "maxrl"}}
SHAPING = {"enabled": True, "overlong_buffer_length": 4, "max_response_length": 8}


@pytest.mark.parametrize(
    ("nodes", "gpus", "resources", "expected"),
    [
        # Policy nodes, ranks on each, engine nodes, GPUs of engines on each.
        (4, 8, {"num_nodes": 1}, (3, 8, 1, 8)),
        (4, 8, {"num_nodes": 3, "gpus_per_node": 8}, (1, 8, 3, 8)),
        (1, 8, {"gpus_per_node": 2}, (1, 6, 1, 2)),
        (1, 8, {"gpus_per_node": 2, "num_nodes": 1}, (1, 6, 1, 2)),
        (2, 0, {"num_nodes": 1}, (1, 1, 1, 0)),
        (4, 8, {}, "resources.num_nodes, which is null: of cluster.num_nodes 4 with .* so 1 to 3$"),
        (4, 8, {"num_nodes": 4}, "resources.num_nodes, which is 4: of .* so 1 to 3$"),
        (4, 8, {"num_nodes": 1, "gpus_per_node": 4}, "gpus_per_node 4: of .* whole nodes, so it must be null or 8"),
        (1, 8, {}, "resources.gpus_per_node, which is null: of cluster.num_nodes 1 with .* so 1 to 7$"),
        (1, 8, {"gpus_per_node": 8}, "resources.gpus_per_node, which is 8: .* so 1 to 7$"),
        (1, 8, {"gpus_per_node": 2, "num_nodes": 2}, "num_nodes 2: of .* it must be null or 1"),
        (1, 1, {"gpus_per_node": 1}, "gpus_per_node 1 cannot be shared out"),
        (1, 0, {}, "gpus_per_node 0 cannot be shared out"),
    ],
)
def test_disaggregated_engines_get_their_own_nodes_or_gpus(
    tmp_path: Path, nodes: int, gpus: int, resources: dict[str, int], expected: Any
) -> None:
    def made() -> TrainConfig:
        return tiny_config(
            tmp_path,
            grpo={"num_prompts_per_step": 16},
            policy={
                "from_scratch": {},
                "train_global_batch_size": 32,
                "generation": {"colocated": {"enabled": False, "resources": resources}},
            },
            cluster={"num_nodes": nodes, "gpus_per_node": gpus},
        )

    if isinstance(expected, str):
        with pytest.raises(ValidationError, match=expected):
            made()
        return
    found = made()
    has = (found.num_policy_nodes, found.ranks_per_node, found.num_engine_nodes, found.engine_gpus_per_node)
    assert has == expected
    assert found.num_ranks == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("way", "cluster", "generation", "expected"),
    [
        ("auto", {"gpus_per_node": 0, "num_nodes": 2}, {}, ("shared", "broadcast")),
        ("auto", {"gpus_per_node": 4}, {}, ("ipc", "ipc")),
        ("auto", {"gpus_per_node": 4}, {"apart": {"gpus_per_node": 2}}, ("broadcast", "broadcast")),
        ("auto", {"gpus_per_node": 4, "num_nodes": 2}, {"apart": {"num_nodes": 1}}, ("broadcast", "broadcast")),
        ("auto", {"gpus_per_node": 4, "num_nodes": 2}, {"lora": True}, ("shared", "disk")),
        ("disk", {"gpus_per_node": 0, "num_nodes": 2}, {}, ("disk", "disk")),
        (
            "shared",
            {"gpus_per_node": 0, "num_nodes": 2},
            {},
            "shared is for engines on the policy's own node, of .* 2:",
        ),
        ("broadcast", {"gpus_per_node": 4}, {}, "broadcast is between GPUs, and .*colocated.enabled true has engines"),
        (
            "ipc",
            {"gpus_per_node": 0},
            {},
            "ipc needs GPUs that .* cluster.gpus_per_node is 0, .*enabled true: use auto",
        ),
        ("ipc", {"gpus_per_node": 4}, {"apart": {"gpus_per_node": 2}}, "ipc needs GPUs that .*colocated.enabled false"),
        ("ipc", {"gpus_per_node": 4}, {"lora": True}, "ipc is from GPU to GPU, and .*lora_cfg.enabled true merges"),
    ],
)
def test_weight_transfer_resolves_to_a_method_for_local_and_remote_engines(
    tmp_path: Path, way: str, cluster: dict[str, int], generation: dict[str, Any], expected: Any
) -> None:
    asked: dict[str, Any] = {"weight_transfer": way}
    if "apart" in generation:
        asked["colocated"] = {"enabled": False, "resources": generation["apart"]}
    policy = {"from_scratch": {}, "train_global_batch_size": 16, "generation": asked}
    policy |= {"dtensor_cfg": {"lora_cfg": {"enabled": True}}} if "lora" in generation else {}

    def ways() -> tuple[str, str]:
        config = tiny_config(tmp_path, grpo={"num_prompts_per_step": 8}, policy=policy, cluster=cluster)
        return config.weight_way(is_beside=True), config.weight_way(is_beside=False)

    if isinstance(expected, str):
        with pytest.raises(ValidationError, match=expected):
            ways()
    else:
        assert ways() == expected


def test_an_engine_spans_gpus_of_one_node(tmp_path: Path) -> None:
    def made(size: int, backend: str = "vllm", **colocated: Any) -> TrainConfig:
        generation = {"backend": backend, "vllm_cfg": {"tensor_parallel_size": size}, "colocated": colocated}
        return tiny_config(
            tmp_path, policy={"from_scratch": {}, "generation": generation}, cluster={"gpus_per_node": 4}
        )

    assert made(4).num_ranks == 4
    with pytest.raises(ValidationError, match="tensor_parallel_size 3 must divide the 4 GPUs of a node that engines"):
        made(3)
    with pytest.raises(ValidationError, match="tensor_parallel_size 4 must divide the 2 GPUs of a node that engines"):
        made(4, enabled=False, resources={"gpus_per_node": 2})
    with pytest.raises(ValidationError, match="tensor_parallel_size 2 needs backend vllm, and it is torch"):
        made(2, backend="torch")
    with pytest.raises(ValidationError, match="resources gpus_per_node 2 is for engines apart from the policy"):
        made(2, resources={"gpus_per_node": 2})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("grpo", {"num_promts_per_step": 4}, "Extra inputs are not permitted"),
        ("grpo", {"num_prompts_per_step": "4"}, "valid integer"),
        ("grpo", {"num_prompts_per_step": True}, "valid integer"),
        ("grpo", {"num_prompts_per_step": 0}, "greater than or equal to 1"),
        ("grpo", {"num_generations_per_prompt": 1}, "needs 2 or more"),
        ("grpo", {"num_prompts_per_step": 3}, "train_global_batch_size 4 must divide the 6 samples"),
        ("cluster", {"num_nodes": 8}, "4 leaves some of the 8 data-parallel ranks without a sample"),
        ("policy", {"model_name": "Qwen/Qwen3-0.6B"}, "exactly one of policy.model_name"),
        ("policy", {"from_scratch": None}, "exactly one of policy.model_name"),
        (
            "policy",
            {"tokenizer": {"chat_template_kwargs": {"tools": []}}},
            "chat_template_kwargs: slurmkit itself gives tools to the template, leave it out",
        ),
        ("policy", {"generation": {"max_new_tokens": 64}}, "it must be at most 63"),
        ("policy", {"generation": {"min_new_tokens": 64}}, "more than policy.max_total_sequence_length allows: .* 63"),
        (
            "policy",
            {"generation": {"min_new_tokens": 9, "max_new_tokens": 8}},
            "min_new_tokens 9 is more than policy.generation.max_new_tokens allows: it must be at most 8",
        ),
        ("policy", {"generation": {"min_new_tokens": 2}}, "min_new_tokens 2 makes the sampled tokens likelier"),
        ("policy", {"generation": {"stop_token_ids": [3, -1]}}, "greater than or equal to 0"),
        ("policy", {"generation": {"temperature": 0.0}}, "greater than 0"),
        ("policy", {"from_scratch": {"hidden_size": 30}}, "multiple of twice num_attention_heads"),
        ("policy", {"from_scratch": {"num_key_value_heads": 3}}, "multiple of num_key_value_heads"),
        ("env", {"name": "math"}, "data.train.data_path must name a JSONL file"),
        ("data", {"train": {"data_path": "x.jsonl"}}, "data.train.data_path must be null"),
        ("data", {"train": {"weight": 2.0}}, "train.weight 2 is relative to other sources"),
        ("data", {"train": []}, "at least 1 items"),
        ("data", {"train": [{"wieght": 2.0}]}, r"^data.train.0.wieght: Extra inputs are not permitted$"),
        ("data", {"train": {"data_pth": "x"}}, r"^data.train.data_pth: Extra inputs are not permitted$"),
        ("data", {"train": 3}, r"^data.train: .*\ndata.train: should be a valid tuple$"),
        ("data", {"train": [{"weight": 2.0}, {}]}, "data.train.0.weight 2, data.train.1.weight null"),
        ("data", {"validation": {"weight": 2.0}}, "data.validation.weight: Extra inputs are not permitted"),
        ("data", {"train": {"subset": "main"}}, "subset main is of a data set on the hub, which needs split"),
        ("grpo", {"batch_multiplier": 1.5}, "batch_multiplier 1.5 is of dynamic sampling"),
        ("grpo", {"stop_at_validation_metric": "val:accuracy"}, "stop_at_validation_threshold null go together"),
        ("grpo", {"stop_at_validation_threshold": 0.5}, "stop_at_validation_metric null and"),
        ("grpo", STOP | {"stop_at_validation_metric": "accuracy"}, "must be one of val:accuracy, val:reward_mean$"),
        ("grpo", STOP | {"val_num_generations_per_prompt": 6}, "val:pass@1, val:pass@2, val:pass@4, val:pass@6$"),
        ("grpo", STOP | {"stop_at_validation_metric": "val:accuracy", "val_period": 0}, "val_period 0 leaves them out"),
        ("grpo", {"reward_scaling": {"source_min": 1.0}}, "source_min 1 must be less than source_max 1"),
        ("grpo", {"reward_shaping": {"enabled": True, "max_response_length": 9}}, "needs overlong_buffer_length;"),
        ("grpo", {"reward_shaping": SHAPING | {"stop_properly_penalty_coef": 0.5}}, "takes the place of the soft"),
        ("grpo", {"reward_shaping": SHAPING | {"overlong_buffer_length": 9}}, "9 is more than max_response_length 8"),
        ("grpo", MAXRL | {"reward_shaping": SHAPING}, "maxrl .* and reward_shaping.max_response_length makes rewards"),
        ("grpo", MAXRL | {"reward_scaling": {"enabled": True, "target_min": -1.0}}, "and reward_scaling.target_min"),
        (
            "checkpointing",
            {"metric_name": "val:acuracy"},
            "val:acuracy is not computed .*nearest that is is val:accuracy",
        ),
        (
            "checkpointing",
            {"metric_name": "time:checkpoint_write"},
            "time:checkpoint_write is not computed by this run",
        ),
        ("checkpointing", {"checkpoint_must_save_by": "3:45:00"}, "should be DD:HH:MM:SS, such as 00:03:45:00 .*not"),
        ("checkpointing", {"checkpoint_must_save_by": "00:24:00:00"}, "should be DD:HH:MM:SS"),
        ("cluster", {"peak_tflops_per_gpu": 0.0}, "greater than 0"),
        ("loss_fn", {"ratio_clip_min": float("nan")}, "ratio_clip_min"),
        ("loss_fn", {"use_cispo": True, "disable_ppo_ratio": True}, "exclude each other"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(
    tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(tmp_path, **{section: values})


def test_a_loss_that_does_not_fit_the_rest_is_refused(tmp_path: Path) -> None:
    forced = {"loss_fn": {"force_on_policy_ratio": True}}
    assert tiny_config(tmp_path, **forced).loss_fn.force_on_policy_ratio
    with pytest.raises(ValidationError, match=r"train_global_batch_size 2 makes 2 updates .* set it to 4"):
        tiny_config(tmp_path, **forced, policy={"train_global_batch_size": 2})
    in_reward = {"use_kl_in_reward": True, "reference_policy_kl_penalty": 0.1, "reference_policy_kl_type": "k1"}
    with pytest.raises(ValidationError, match="maxrl divides by a mean"):
        tiny_config(tmp_path, loss_fn=in_reward, grpo={"adv_estimator": {"name": "maxrl"}})


def test_truncated_sampling_is_refused_if_it_biases_a_ratio_or_a_weight(tmp_path: Path) -> None:
    def check(loss_fn: dict[str, Any], **generation: Any) -> None:
        tiny_config(tmp_path, loss_fn=loss_fn, policy={"generation": generation})

    with pytest.raises(ValidationError, match=r"generation.top_p 0.9 makes .* set loss_fn.force_on_policy_ratio"):
        check({}, top_p=0.9)
    with pytest.raises(ValidationError, match=r"generation.top_k 5 makes the sampled tokens likelier"):
        check({}, top_k=5)
    both = {"force_on_policy_ratio": True, "use_importance_sampling_correction": True}
    with pytest.raises(ValidationError, match=r"top_p 0.9 never draws .*use_importance_sampling_correction true"):
        check(both, top_p=0.9)
    check({"force_on_policy_ratio": True}, top_p=0.9, top_k=5)
    check({"disable_ppo_ratio": True}, top_p=0.9, top_k=5)
    check(both, top_p=1.0)


def test_async_grpo_is_refused_without_correction_or_engine_support(tmp_path: Path) -> None:
    def check(asynchronous: dict[str, Any], **loss_fn: bool) -> None:
        tiny_config(tmp_path, grpo={"async_grpo": {"enabled": True, **asynchronous}}, loss_fn=loss_fn)

    check({"max_trajectory_age_steps": 0})
    check({}, use_importance_sampling_correction=True)
    message = (
        r"grpo.async_grpo.enabled true with max_trajectory_age_steps 1 trains on tokens of older weights, for which "
        r"loss_fn.use_importance_sampling_correction false does not correct: set it to true"
    )
    with pytest.raises(ValidationError, match=message):
        check({})
    with pytest.raises(ValidationError, match=r"loss_fn.force_on_policy_ratio true does not correct: set it to false"):
        check({}, use_importance_sampling_correction=True, force_on_policy_ratio=True)
    message = r"in_flight_weight_updates true needs policy.generation.backend vllm, and it is torch"
    with pytest.raises(ValidationError, match=message):
        check({"in_flight_weight_updates": True}, use_importance_sampling_correction=True)


def test_errors_in_one_section_do_not_hide_errors_across_sections(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as refused:
        tiny_config(
            tmp_path,
            grpo={"max_num_steps": 0, "batch_multiplier": 2.0},
            policy={"train_global_batch_size": 3},
            loss_fn={"ratio_clip_min": -1.0, "use_cispo": True, "disable_ppo_ratio": True},
        )
    told = str(refused.value)
    for part in ("max_num_steps", "batch_multiplier 2", "batch_size 3 must divide", "ratio_clip_min", "exclude each"):
        assert part in told
    assert len(refused.value.problems) == 5


def test_a_rule_about_a_value_that_is_wrong_is_not_told_as_well(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as refused:
        tiny_config(tmp_path, policy={"train_global_batch_size": "three"}, grpo={"batch_multiplier": []})
    assert [problem.location[-1] for problem in refused.value.problems] == [
        "batch_multiplier",
        "train_global_batch_size",
    ]


def test_all_rules_of_a_section_that_are_broken_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as refused:
        tiny_config(tmp_path, grpo={"batch_multiplier": 2.0, "stop_at_validation_threshold": 1.0})
    assert [problem.location for problem in refused.value.problems] == [("grpo",), ("grpo",)]


def test_where_nothing_is_validated_no_tasks_for_it_are_needed(tmp_path: Path) -> None:
    never = {"checkpointing": {"metric_name": None}, "grpo": {"val_period": 0}}
    never = {"env": {"name": "math"}, "data": {"train": {"data_path": "rows.jsonl"}}, **never}
    assert not tiny_config(tmp_path, **never).validates
    for section, values in (
        ("checkpointing", {"metric_name": "val:reward_mean"}),
        ("grpo", {"val_period": 5}),
        ("grpo", {"val_period": 0, "val_at_start": True}),
        ("grpo", {"val_period": 0, "val_at_end": True}),
    ):
        with pytest.raises(ValidationError, match=r"data.validation.data_path must name .*split_validation_size be"):
            tiny_config(tmp_path, **{**never, section: values})
    split = {"train": [{"data_path": "a"}, {"data_path": "b", "split_validation_size": 0.1}]}
    assert tiny_config(tmp_path, **{**never, "grpo": {"val_period": 5}, "data": split}).validates


def test_checkpoint_must_save_by_counts_days_hours_minutes_and_seconds() -> None:
    given = Checkpointing(checkpoint_must_save_by="01:03:45:10")
    assert given.must_save_by_seconds == ((24 + 3) * 60 + 45) * 60 + 10
    assert Checkpointing().must_save_by_seconds is None


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny_config(tmp_path).grpo.seed = 3  # type: ignore[misc]


def test_ranks_are_nodes_times_devices_and_one_per_node_without_any(tmp_path: Path) -> None:
    assert tiny_config(tmp_path, cluster={"num_nodes": 2, "gpus_per_node": 2}).num_ranks == 4
    assert tiny_config(tmp_path, cluster={"num_nodes": 3, "gpus_per_node": 0}).num_ranks == 3


@pytest.mark.parametrize("model", [TrainConfig, Grpo, Data, Policy, JobSpec, SiteFile])
def test_every_key_says_what_it_means(model: type[Section]) -> None:
    """A string under the key, which reading the source finds; at run time nothing needs it."""
    module = ast.parse(Path(inspect.getfile(model)).read_text())
    for section in (node for node in module.body if isinstance(node, ast.ClassDef) and node.bases):
        for field, below in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                assert isinstance(below, ast.Expr), f"{section.name}.{field.target.id} has no docstring"


def test_the_examples_are_valid() -> None:
    load_config(REPOSITORY / "examples" / "grpo_arithmetic.yaml", [])
    paths = ["data.train.data_path=a.jsonl", "data.validation.data_path=b.jsonl"]
    load_config(REPOSITORY / "examples" / "grpo_gsm8k.yaml", paths)
