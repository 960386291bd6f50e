"""slurmkit: one readable sbatch file, Ray on every allocated node, GRPO until the model is trained."""

__version__ = "0.1.0"
