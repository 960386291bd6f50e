"""The command line as a user meets it: one message, exit code 2, no traceback, nothing written.

Each row is what somebody typed or wrote into a file, and the message that it gets. In a message, `job.yaml:1` and the
like are the place that must be named.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slurmkit.cli.main import main
from tests.support.requirements import REPOSITORY, SLURMKIT

EXAMPLE = REPOSITORY / "examples" / "grpo_arithmetic.yaml"
TRAIN = "env: {name: arithmetic}\npolicy: {from_scratch: {}}\ncluster: {gpus_per_node: 0}\n"

FLAGS = [
    ("", "nothing to run: give --config FILE for slurmkit's trainer, or a command of your own after --"),
    ("--", "nothing follows --"),
    ("--nodes 0 -- true", "nodes: should be greater than or equal to 1, not 0 (command line: nodes)"),
    ("--nodes -1 -- true", "nodes: should be greater than or equal to 1, not -1"),
    ("--nodes 10001 -- true", "nodes: should be less than or equal to 10000, not 10001"),
    ("--nodes many -- true", "'many' is not a valid integer"),
    ("--nodes 1.5 -- true", "'1.5' is not a valid integer"),
    ("--nodes", "Option '--nodes' requires an argument"),
    ("--nodse 2 -- true", "No such option '--nodse'"),
    ("--requeue -- true", "No such option '--requeue': set it with --set requeue=true\n"),
    ("--array 1-3 -- true", "No such option '--array': set it with --set array=VALUE\n"),
    ("-a 1-3 -- true", "No such option '-a': set it with --set array=VALUE\n"),
    ("--begin=now -- true", "No such option '--begin': set it with --set sbatch.begin=VALUE\n"),
    ("-M other -- true", "No such option '-M': set it with --set sbatch.clusters=VALUE\n"),
    ("--hold -- true", "No such option '--hold': set it with --set sbatch.hold=true\n"),
    ("-J x -- true", "No such option '-J': the run's name is the job's: give --name\n"),
    ("--container-image x -- true", "No such option '--container-image': give --image\n"),
    ("--ntasks 2 -- true", "No such option '--ntasks': one task runs on each node: give --nodes\n"),
    ("-n 2 -- true", "-n 2: -n is --name here: give --nodes 2 for nodes, or --name 2 for a run of that name"),
    ("-n2 -- true", "-n 2: -n is --name here"),
    ("-c 4 -- true", "-c 4: -c is --config here: give --cpus-per-task 4 for CPUs on each node"),
    ("--image x -- true", "container: image need a container: give runtime"),
    ("--secret A=x -- true", "--secret: write NAME, NAME=env:VARIABLE, NAME=file:PATH or NAME=command:COMMAND"),
    ("--secret A=file:x -- true", "secrets.A: file must be an absolute path"),
    ("--config none.yaml", "none.yaml: no such file"),
    ("--config .", "cannot be read"),
    ("--config example.yaml -- true", "--config and a command after -- exclude each other"),
    ("grpo.seed=1 -- true", "'grpo.seed=1' overrides a training configuration: give one with --config FILE"),
    ("a.yaml b.yaml", "one run file at most, not a.yaml and b.yaml"),
    ("none.yaml -- true", "none.yaml: no such file"),
    ("x.sbatch", "x.sbatch is a rendered file: slurmkit submit takes it as it is, and nothing else does"),
    ("--set container.runtime=docker --set container.image=/i -- true", "has no template container/docker.sh.j2"),
    ("--set container.runtime=pyxis -- true", "container: image is missing: container.runtime pyxis needs one"),
    ("--set container.image=/i -- true", "container: image need a container: give runtime"),
    ("--set container.mounts=[a] -- true", "container.mounts.0: 'a' is not a mount"),
    ("--set container.mounts=[/a:/b:rx] -- true", "container.mounts.0: '/a:/b:rx' is not a mount"),
    ("--set container.mounts=[$NOWHERE:/b] -- true", "container: '$NOWHERE': the variable NOWHERE is not set"),
    ("--env HF_TOKEN=x -- true", "env.HF_TOKEN"),
    ("--env MY_API_KEY=x -- true", "env.MY_API_KEY"),
    ("--set secrets=3 -- true", "secrets"),
    ("--set secrets.X=nowhere -- true", "secrets.X"),
    ("--set umask=999 -- true", "umask: '999' is not octal and 077 at most"),
    ("--set signal=B:@5 -- true", "signal: 'B:@5' is not a signal for sbatch"),
    ("--env X -- true", "--env 'X': write NAME=VALUE"),
    ("--env =x -- true", "--env '=x': write NAME=VALUE"),
    ("--env 1X=x -- true", "env.1X: '1X' cannot name an environment variable"),
    ("--env a-b=x -- true", "env.a-b: 'a-b' cannot name an environment variable"),
    ("--env SLURM_JOB_ID=1 -- true", "env.SLURM_JOB_ID: cannot be set: SLURM_JOB_ID belongs to Slurm"),
    ("--env SBATCH_ACCOUNT=1 -- true", "env.SBATCH_ACCOUNT: cannot be set: SBATCH_ACCOUNT belongs to Slurm"),
    ("--env SK_MEET=x -- true", "env.SK_MEET: cannot be set: SK_MEET belongs to slurmkit"),
    ("--set nodes -- true", "--set 'nodes': write NAME=VALUE"),
    ("--set nodes=[ -- true", "--set nodes=[: not a YAML value"),
    ("--nodes 2 --set nodes.x=1 -- true", "nodes: should be a valid integer, not {'x': 1}"),
    ("--set container=none -- true", "container: should be a valid dictionary or instance of Container, not 'none'"),
    ("--set container.runtme=none -- true", "unknown key container.runtme"),
    (
        "--set ray.num_cpu=4 -- true",
        "unknown key ray.num_cpu (command line: ray.num_cpu); the nearest known key is ray.n",
    ),
    ("--set ray.num_cpus=0 -- true", "ray.num_cpus: should be greater than or equal to 1, not 0"),
    ("--set ray.num_cpus=four -- true", "ray.num_cpus: should be a valid integer, not 'four'"),
    ("--set ray.start_timeout=5 -- true", "ray.start_timeout: should be greater than or equal to 10, not 5"),
    ("--set ray.object_store_memory=1 -- true", "ray.object_store_memory: should be greater than or equal to 80000000"),
    ("--set run_dir=results -- true", "run_dir: 'results' is not an absolute path"),
    ("--set nowhere=1 -- true", "unknown key nowhere (command line: nowhere)"),
    ("--set prologue=[date] -- true", "prologue (command line: prologue) is the site's to set: write setup"),
    ("--set sbatch.array=1-3 -- true", "sbatch.array: set by slurmkit itself: use the key array"),
    ("--set sbatch.job-name=x -- true", "sbatch.job-name: set by slurmkit itself: use the key name"),
    ("--set sbatch.part=x -- true", "sbatch.part: short for partition, which is set by slurmkit itself"),
    ("--set sbatch.out=x -- true", "sbatch.out: short for output, which is set by slurmkit itself"),
    ("--set sbatch.wrap=x -- true", "sbatch.wrap: set by slurmkit itself"),
    ("--set sbatch.export=NONE -- true", "sbatch.export: set by slurmkit itself"),
    ("--set sbatch.--hold=true -- true", "sbatch.--hold: '--hold' is not a long option of sbatch"),
    ("--set sbatch.H=true -- true", "sbatch.H: 'H' is not a long option of sbatch"),
    ("--set sbatch.nice=[1] -- true", "sbatch.nice: should be a valid string, not [1]"),
    ("--name ../x -- true", "'../x' cannot be a run's name"),
    ("--name -x -- true", "'-x' cannot be a run's name"),
    ("--name a/b -- true", "'a/b' cannot be a run's name"),
    ("--name .. -- true", "'..' cannot be a run's name"),
    ("--time soon -- true", "time: 'soon' is not a Slurm time: minutes, h:mm:ss or d-hh:mm:ss"),
    ("--time 1h -- true", "time: '1h' is not a Slurm time"),
    ("--time -5 -- true", "time: '-5' is not a Slurm time"),
    ("--time 1-2-3 -- true", "time: '1-2-3' is not a Slurm time"),
    ("--time 10 --set time_min=20 -- true", "time_min (20) is longer than time (10)"),
    ("--mem 64GB -- true", "mem: '64GB' is not a size such as 64G"),
    ("--mem 1.5G -- true", "mem: '1.5G' is not a size such as 64G"),
    ("--mem 64G --set mem_per_gpu=8G -- true", "mem (64G) and mem_per_gpu (8G) both ask for memory; give one"),
    ("--gres gpu: -- true", "gres: 'gpu:' is not a GRES such as gpu:8, gpu:h100:8 or gpu:2080ti:1"),
    ("--gres 8 -- true", "gres: '8' is not a GRES"),
    ("--gres gpu:h100:8:9 -- true", "gres: 'gpu:h100:8:9' is not a GRES"),
    ("--gres gpu:8 --gpus-per-node 8 -- true", "gres (gpu:8) and gpus_per_node (8) both ask for GPUs; give one"),
    ("--gpus 8 --gpus-per-node 8 -- true", "gpus (8) and gpus_per_node (8) both ask for GPUs; give one"),
    ("--gpus-per-node eight -- true", "gpus_per_node: 'eight' is not a count or TYPE:COUNT"),
    ("--gpus h100 -- true", "gpus: 'h100' is not a count or TYPE:COUNT"),
    ("--cpus-per-task 0 -- true", "cpus_per_task: should be greater than or equal to 1, not 0"),
    ("--set cpus_per_gpu=0 -- true", "cpus_per_gpu: should be greater than or equal to 1, not 0"),
    ("--set exclusive=maybe -- true", "exclusive: should be"),
    ("--set requeue=yes -- true", "requeue: should be a valid boolean, not 'yes'"),
    ("--set signal=USR2@ -- true", "signal: 'USR2@' is not a signal for sbatch, such as B:USR2@300"),
    ("--set signal=soon -- true", "signal: 'soon' is not a signal for sbatch"),
    ("--set array=a-b -- true", "array: 'a-b' is not an array such as 0-7 or 1,5,9%2"),
    ("--set array=0-7 --config example.yaml", "array (0-7) would have all its jobs train in one run directory"),
    ("--set partition='' -- true", "partition: is empty; leave the key out instead"),
    ("--set account=[a] -- true", "account: should be a valid string, not ['a']"),
    ("--set setup=date -- true", "setup: should be a valid tuple, not 'date'"),
    ("--set epilogue=3 -- true", "epilogue: should be a valid tuple, not 3"),
    (
        "--profile debug -- true",
        "profile: there is no profile 'debug' (--profile); no file defines one under profiles:",
    ),
    ("--set templates=nowhere -- true", "nowhere: no such folder"),
    ("--config example.yaml grpo.num_promts_per_step=4", "the nearest known key is grpo.num_prompts_per_step"),
    (
        "--config example.yaml grpo.seed=one",
        "grpo.seed: should be a valid integer, not 'one' (command line: grpo.seed=one)",
    ),
    ("--config example.yaml grpo.seed=1,2", "is a sweep over several values; give one value"),
    ("--config example.yaml grpo.seed=[", "is not Hydra's key=value"),
    ("--config example.yaml ~grpo.nothing", "removes a key that the configuration does not set"),
    ("--config example.yaml cluster.num_nodes=3", "cluster.num_nodes is 3 (command line: cluster.num_nodes=3) but"),
    ("--config example.yaml policy.train_global_batch_size=7", "must divide the 512 samples of a step"),
    ("--config example.yaml policy.model_name=/x", "give exactly one of policy.model_name"),
    ("--config example.yaml policy.from_scratch.hidden_size=65", "must be a multiple of twice num_attention_heads"),
    ("--config example.yaml policy.generation.max_new_tokens=99", "leaves no room for a prompt within"),
    (
        "--config example.yaml policy.generation.backend=sglang",
        "policy.generation.backend: should be 'torch' or 'vllm', not 'sglang'",
    ),
    (
        "--config example.yaml policy.generation.vllm_kwargs.max_num_seqs=4",
        "slurmkit sets max_num_seqs (use policy.generation.max_batch_size)",
    ),
    (
        "--config example.yaml policy.generation.temperature=0",
        "policy.generation.temperature: should be greater than 0",
    ),
    ("--config example.yaml policy.precision=fp8", "policy.precision: should be 'float32' or 'bfloat16', not 'fp8'"),
    (
        "--config example.yaml loss_fn.ratio_clip_min=1.5",
        "loss_fn.ratio_clip_min: should be less than or equal to 1, not 1.5",
    ),
    (
        "--config example.yaml checkpointing.metric_name=loss",
        "checkpointing.metric_name loss is not computed by this run; the nearest that is is train:loss",
    ),
    (
        "--config example.yaml checkpointing.checkpoint_must_save_by=4h",
        "checkpointing.checkpoint_must_save_by: should be DD:HH:MM:SS, such as 00:03:45:00",
    ),
    (
        "--config example.yaml checkpointing.keep_top_k=0",
        "checkpointing.keep_top_k: should be greater than or equal to 1",
    ),
    (
        "--config example.yaml env.name=chess",
        "env.name: should be 'arithmetic', 'math', 'workplace' or 'gym', not 'chess'",
    ),
    (
        "--config example.yaml env.name=math",
        "env.name math reads its tasks: data.train.data_path must name a JSONL file",
    ),
    ("--config example.yaml data.train.data_path=x", "makes its own tasks: data.train.data_path must be null"),
    (
        "--config example.yaml grpo.num_generations_per_prompt=1",
        "num_generations_per_prompt is 1: an advantage compares",
    ),
    ("--config example.yaml loss_fn=3", "loss_fn: should be a valid dictionary or instance of LossFn, not 3"),
    ("--config example.yaml logger.wandb.mode=off", "logger.wandb.mode: should be 'online' or 'offline'"),
    (
        f"--config example.yaml logger.wandb.tags=[sums,{'x' * 65}]",
        "logger.wandb.tags.1: a tag of W&B has 1 to 64 characters, this one has 65",
    ),
]

# A run file, and what it is told.
RUN_FILES = [
    ("command: true\n", "command: should be a valid tuple, not True (job.yaml:1)"),
    ("command: date\n", "command: should be a valid tuple, not 'date' (job.yaml:1)"),
    ("command: []\n", "command: must not be empty (job.yaml:1)"),
    ("command: [date, null]\n", "command.1: should be a valid string, not None (job.yaml:1)"),
    ('command: ["a\\0b"]\n', "command.0: 'a\\x00b' holds a NUL byte, which no argument can carry (job.yaml:1)"),
    ("nodse: 2\ncommand: [date]\n", "unknown key nodse (job.yaml:1); the nearest known key is nodes"),
    ("command: [date]\nnodes: two\n", "nodes: should be a valid integer, not 'two' (job.yaml:2)"),
    ("command: [date]\nnodes: '2'\n", "nodes: should be a valid integer, not '2' (job.yaml:2)"),
    ("command: [date]\nnodes: 2.0\n", "nodes: should be a valid integer, not 2.0 (job.yaml:2)"),
    ("command: [date]\nnodes: [2]\n", "nodes: should be a valid integer, not [2] (job.yaml:2)"),
    ("command: [date]\nnodes: true\n", "nodes: should be a valid integer, not True (job.yaml:2)"),
    ("command: [date]\nexclusive: 1\n", "exclusive: should be"),
    ("command: [date]\ntime: 1.5\n", "time: should be a valid string, not 1.5 (job.yaml:2)"),
    ("command: [date]\ntime: 4:00 h\n", "time: '4:00 h' is not a Slurm time"),
    ("command: [date]\nenv: [A=1]\n", "env: should be a valid dictionary, not ['A=1'] (job.yaml:2)"),
    ("command: [date]\nenv: {A: [1]}\n", "env.A: should be a valid string, not [1] (job.yaml:2)"),
    ("command: [date]\nenv:\n  A: 1.5\n", "env.A: should be a valid string, not 1.5 (job.yaml:3)"),
    ("command: [date]\nenv: {A: true}\n", "env.A: should be a valid string, not True (job.yaml:2)"),
    ("command: [date]\nenv: {'A B': x}\n", "env.A B: 'A B' cannot name an environment variable (job.yaml:2)"),
    ('command: [date]\nenv: {A: "x\\0"}\n', "holds a NUL byte"),
    ('command: [date]\ncomment: "a\\nb"\n', "comment: 'a\\nb' holds a line break"),
    ('command: [date]\ncomment: "a\\tb"\n', "comment: 'a\\tb' holds a line break or another character"),
    (
        f"command: [date]\ncomment: {'x' * 9000}\n",
        "comment: is 9000 bytes long; sbatch reads 8000 at most (job.yaml:2)",
    ),
    ('command: [date]\npartition: "a\\nb"\n', "partition: 'a\\nb' holds a line break"),
    ("command: [date]\nsbatch: [nice]\n", "sbatch: should be a valid dictionary, not ['nice'] (job.yaml:2)"),
    ('command: [date]\nsbatch: {nice: "1\\n2"}\n', "sbatch.nice: '1\\n2' holds a line break"),
    ('command: [date]\nworkdir: "/a\\nb"\n', "workdir: '/a\\nb' holds a backslash or a line break"),
    ("command: [date]\nworkdir: '/a\\b'\n", "workdir: '/a\\\\b' holds a backslash or a line break"),
    ("command: [date]\nresults_dir: 3\n", "results_dir: 3 is not a path (job.yaml:2)"),
    ("command: [date]\nname: 'a b'\n", "'a b' cannot be a run's name"),
    (f"command: [date]\nname: {'x' * 101}\n", "cannot be a run's name"),
    ("command: [date]\nname: 5\n", "name: should be a valid string, not 5 (job.yaml:2)"),
    ("command: [date]\nconfig: x.yaml\n", "job.yaml: config and command exclude each other"),
    ("config: [a]\n", "config: ['a'] is not a path (job.yaml:1)"),
    ("config: none.yaml\n", "none.yaml: no such file"),
    (
        "config: train.yaml\noverrides: grpo.seed=1\n",
        "overrides: must be a list of key=value, not 'grpo.seed=1' (job.yaml:2)",
    ),
    ("config: train.yaml\noverrides: [1]\n", "overrides: must be a list of key=value, not [1] (job.yaml:2)"),
    ("config: job.yaml\n", "unknown key config (job.yaml:1)"),
    ("overrides: [grpo.seed=1]\n", "nothing to run"),
    ("command: [date]\nprologue: [date]\n", "prologue (job.yaml:2) is the site's to set: write setup"),
    ("command: [date]\nsetup: date\n", "setup: should be a valid tuple, not 'date' (job.yaml:2)"),
    ("command: [date]\ntemplates: nowhere\n", "nowhere: no such folder"),
    ("command: [date]\ntemplates: [a]\n", "templates: ['a'] is not a path (job.yaml:2)"),
    ("command: [date]\ncontainer: {runtime: docker}\n", "container.runtime"),
    ("command: [date]\nray: {}\nray: {}\n", "job.yaml:3: not valid YAML: the key 'ray' stands twice, first in line 2"),
    ("command: [date]\n1: 2\n", "job.yaml:2: not valid YAML: the key 1 must be text; quote it"),
    ("command: [date\n", "job.yaml:2: not valid YAML"),
    ("command: [date]\n\tnodes: 2\n", "job.yaml:2: not valid YAML"),
    ("- date\n", "job.yaml: must hold keys and values, found list"),
    ("date\n", "job.yaml: must hold keys and values, found str"),
    ("command: !!python/object:os.system [date]\n", "job.yaml:1: not valid YAML: could not determine a constructor"),
    ("a: *b\n", "job.yaml:1: not valid YAML: found undefined alias 'b'"),
    ("profile: [a]\ncommand: [date]\n", "profile: ['a'] is not a name (job.yaml:1)"),
    ("profile: a\ncommand: [date]\n", "profile: there is no profile 'a' (job.yaml:1); no file defines one"),
    ("profile: b\nprofiles: {a: {}}\ncommand: [date]\n", "no profile 'b' (job.yaml:1); there are a"),
    ("profile: a\nprofiles: [a]\ncommand: [date]\n", "profiles: each name must hold keys of a job (job.yaml:2)"),
    ("profile: a\nprofiles: {a: {nodse: 2}}\ncommand: [date]\n", "unknown key nodse (job.yaml:2)"),
]

# A training configuration, and what it is told.
CONFIGS = [
    ("", "policy is missing: it must be given"),
    ("env: {name: arithmetic}\n", "policy is missing: it must be given"),
    (TRAIN + "polcy: {}\n", "unknown key polcy (train.yaml:4); the nearest known key is policy"),
    (TRAIN + "grpo: {sede: 1}\n", "unknown key grpo.sede (train.yaml:4); the nearest known key is grpo.seed"),
    (TRAIN + "grpo: {seed: -1}\n", "grpo.seed: should be greater than or equal to 0, not -1 (train.yaml:4)"),
    (
        TRAIN + "grpo: {seed: '???'}\n",
        "grpo.seed must be given (train.yaml:4 leaves it open with ???): add grpo.seed=VALUE",
    ),
    (TRAIN + "grpo: {seed: '${nowhere}'}\n", "Interpolation key 'nowhere' not found (key grpo.seed)"),
    (TRAIN + "defaults: none.yaml\n", "none.yaml: no such file"),
    (TRAIN + "defaults: train.yaml\n", "`defaults` leads back to the file itself"),
    (TRAIN + "defaults: {a: b}\n", "train.yaml:4: `defaults` must be a file name or a list of them"),
    (TRAIN + "checkpointing: {checkpoint_dir: 3}\n", "checkpointing.checkpoint_dir: should be a valid string, not 3"),
    (TRAIN + "cluster: {num_nodes: 0}\n", "not valid YAML: the key 'cluster' stands twice"),
]

# A site's file, and what everybody is told until it is put right.
SITES = [
    ("nodes: 2\n", "unknown key nodes (site.yaml:1)"),
    ("defaults: {nodse: 2}\n", "unknown key nodse (site.yaml:1); the nearest known key is nodes"),
    ("defaults: {nodes: 0}\n", "nodes: should be greater than or equal to 1, not 0 (site.yaml:1)"),
    ("defaults: 3\n", "defaults: should be a valid dictionary, not 3 (site.yaml:1)"),
    (
        "lock: [container.runtme]\n",
        "lock: container.runtme is no key of a job (site.yaml:1); the nearest is container.ru",
    ),
    ("lock: qos\n", "lock: should be a valid tuple, not 'qos' (site.yaml:1)"),
    ("require:\n- account\n- acount\n", "require: acount is no key of a job (site.yaml:3); the nearest is account"),
    ("limits: {nodes: {}}\n", "limits.nodes: says nothing: give min, max, allowed or pattern (site.yaml:1)"),
    ("limits: {nodes: 4}\n", "limits.nodes: should be a valid dictionary or instance of Limit, not 4 (site.yaml:1)"),
    ("limits: {nodes: {maximum: 4}}\n", "unknown key limits.nodes.maximum (site.yaml:1)"),
    ("limits: {nodes: {max: many}}\n", "limits.nodes.max: 'many' cannot be compared with"),
    ("limits: {time: {max: 1h}}\n", "limits.time.max: '1h' cannot be compared with: '1h' is not a Slurm time"),
    ("limits: {mem: {max: lots}}\n", "limits.mem.max: 'lots' cannot be compared with"),
    ("limits: {gpus: {max: h100}}\n", "limits.gpus.max: 'h100' cannot be compared with"),
    ("limits: {account: {pattern: '['}}\n", "limits.account.pattern: '[' is not a regular expression"),
    ("limits: {gpuhours: {max: 4}}\n", "limits: gpuhours is no key of a job (site.yaml:1)"),
    ("limits: {nodes: {max: 4}}\ndefaults: {nodes: 5}\n", "nodes: 5 (site.yaml:2) is above the maximum of 4"),
    ("partitions: {gpu: {lock: [qso]}}\n", "lock: qso is no key of a job (site.yaml:1); the nearest is qos"),
    ("partitions: {gpu: {nodes: 4}}\n", "unknown key partitions.gpu.nodes (site.yaml:1)"),
    ("forbid: {envs: [A]}\n", "unknown key forbid.envs (site.yaml:1); the nearest known key is forbid.env"),
    ("forbid: {env: A}\n", "forbid.env: should be a valid tuple, not 'A' (site.yaml:1)"),
    ("add: {env: {A: [1]}}\n", "add.env.A: should be a valid string, not [1] (site.yaml:1)"),
    ("add: {prolog: [date]}\n", "unknown key add.prolog (site.yaml:1); the nearest known key is add.prologue"),
    ("profiles: {debug: 4}\n", "profiles.debug: should be a valid dictionary, not 4 (site.yaml:1)"),
    ("templates: nowhere\n", "nowhere: no such folder"),
    ("defaults: {nodes: 1, nodes: 2}\n", "site.yaml:1: not valid YAML: the key 'nodes' stands twice"),
    ("- a\n", "site.yaml: must hold keys and values, found list"),
]

VARIABLES = [
    ("SLURMKIT_NODSE", "2", "SLURMKIT_NODSE sets no key of a job; the nearest is SLURMKIT_NODES"),
    ("SLURMKIT_NODES", "two", "nodes: should be a valid integer, not 'two' (environment: SLURMKIT_NODES)"),
    ("SLURMKIT_RAY__NUM_CPU", "2", "unknown key ray.num_cpu (environment: SLURMKIT_RAY__NUM_CPU)"),
    ("SLURMKIT_TIME", "soon", "time: 'soon' is not a Slurm time"),
    ("SLURMKIT_SITE", "none.yaml", "none.yaml: no such file"),
    ("SLURMKIT_PROFILE", "x", "profile: there is no profile 'x' (environment: SLURMKIT_PROFILE)"),
    ("SLURMKIT_ENV__1X", "x", "env.1X: '1X' cannot name an environment variable"),
]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this machine's: no site, no user's file, a wide terminal."""
    shutil.copy(EXAMPLE, here / "example.yaml")
    monkeypatch.chdir(here)
    monkeypatch.setenv("SLURMKIT_SITE", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [])


def told(here: Path, capture: Capture, arguments: list[str]) -> str:
    """What slurmkit says to this; it must end with exit code 2, in one message, and leave the folder as it was."""
    before = sorted(here.rglob("*"))
    sys.argv = ["slurmkit", *arguments]
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capture.readouterr()
    assert end.value.code == 2, err
    assert out == ""
    assert err.lower().count("error:") == 1, err
    assert "Traceback" not in err
    assert sorted(here.rglob("*")) == before, "nothing is written"
    return err.replace(f"{here}/", "")


@pytest.mark.parametrize(("line", "message"), FLAGS)
def test_a_mistake_on_the_command_line(here: Path, capsys: Capture, line: str, message: str) -> None:
    assert message in told(here, capsys, ["render", *line.split()])


@pytest.mark.parametrize(("text", "message"), RUN_FILES)
def test_a_mistake_in_a_run_file(here: Path, capsys: Capture, text: str, message: str) -> None:
    (here / "train.yaml").write_text(TRAIN)
    (here / "job.yaml").write_text(text)
    assert message in told(here, capsys, ["render", "job.yaml"])


@pytest.mark.parametrize(("text", "message"), CONFIGS)
def test_a_mistake_in_a_training_configuration(here: Path, capsys: Capture, text: str, message: str) -> None:
    (here / "train.yaml").write_text(text)
    assert message in told(here, capsys, ["render", "--config", "train.yaml"])


@pytest.mark.parametrize(("text", "message"), SITES)
def test_a_mistake_in_a_site_s_file(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (here / "site.yaml").write_text(text)
    assert message in told(here, capsys, ["site", "lint", str(here / "site.yaml")])
    monkeypatch.setenv("SLURMKIT_SITE", str(here / "site.yaml"))
    assert message in told(here, capsys, ["render", "--", "true"])


@pytest.mark.parametrize(("name", "value", "message"), VARIABLES)
def test_a_mistake_in_a_variable(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    assert message in told(here, capsys, ["render", "--", "true"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["traim"], "No such command 'traim'"),
        (["run"], "nothing to run"),
        (["run", "--nodes", "2", "--", "true"], "No such option '--nodes': this command runs here, without Slurm"),
        (["run", "--requeue", "--", "true"], "No such option '--requeue': this command runs here, without Slurm"),
        (["site", "lint"], "Missing argument 'FILE'"),
        (["site", "lint", "none.yaml"], "none.yaml: no such file"),
        (["site", "init", "--out", "example.yaml"], "exists already; slurmkit does not write over a site's file"),
    ],
)
def test_a_mistake_with_a_command(here: Path, capsys: Capture, arguments: list[str], message: str) -> None:
    assert message in told(here, capsys, arguments)


def test_the_table_is_long_enough() -> None:
    assert len(FLAGS) + len(RUN_FILES) + len(CONFIGS) + len(SITES) + len(VARIABLES) >= 150


def slurmkit(here: Path, *arguments: str | Path, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SLURMKIT, *arguments],
        cwd=here,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_cannot_be_written_is_a_failure_and_not_a_mistake(here: Path) -> None:
    (here / "a file").write_text("")
    done = slurmkit(here, "render", "--out", "a file/x.sbatch", "--", "true")
    assert done.returncode == 1
    assert "a file/x.sbatch cannot be written" in done.stderr


def test_without_slurm_submit_says_what_to_do_instead(here: Path) -> None:
    done = slurmkit(here, "submit", "--", "true", path="/nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "error: sbatch is not on PATH: submit from a login node of a Slurm cluster, or run here without Slurm: "
        "slurmkit run\n"
    )


def test_render_writes_the_bytes_that_it_prints(here: Path) -> None:
    printed = slurmkit(here, "render", "--config", EXAMPLE, "--nodes", "2").stdout
    done = slurmkit(here, "render", "--config", EXAMPLE, "--nodes", "2", "--out", "job file.sbatch")
    assert done.returncode == 0, done.stderr
    assert (here / "job file.sbatch").read_text() == printed
