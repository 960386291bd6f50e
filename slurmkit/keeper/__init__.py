"""What watches over a job from inside.

The modules here become one plain file (job/keeper_file.py), which is put beside job.sbatch and
knows nothing of slurmkit.
Batch nodes may have an old Python without packages, so they run on 3.6 with its standard library.
"""
