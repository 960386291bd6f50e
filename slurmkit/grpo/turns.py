"""Policy and engines that share GPUs take turns with their memory; everybody else just gets new weights."""

from __future__ import annotations

from dataclasses import dataclass

from slurmkit.generation.pool import EnginePool
from slurmkit.generation.transfer import WeightTransfer
from slurmkit.grpo.policy import Policy


@dataclass(slots=True)
class Turns:
    """Whose turn it is. The engines' first, once `begin` is over."""

    policy: Policy
    pool: EnginePool
    transfer: WeightTransfer
    are_taken: bool
    """False where both have their memory all the time: nobody sleeps."""

    async def begin(self) -> None:
        """Once both are there."""
        if self.are_taken:
            await self.policy.rest()

    async def of_policy(self) -> None:
        """Nothing is sampled from now on: the engines sleep, with their weights in the CPU's memory, and the policy has
        what it needs on the GPU."""
        if self.are_taken:
            await self.pool.sleep()
            await self.policy.wake()

    async def of_engines(self, *, have_changed: bool = True) -> None:
        """New weights, if they have changed, and sampling goes on.

        What each has of the GPU never adds up to more than there is: the engines' weights come back first, then the new
        ones, which the policy has there yet; the cache comes where the policy was.
        """
        if self.are_taken:
            await self.pool.wake("weights")
        if have_changed:
            await self.pool.load(self.transfer)
        if self.are_taken:
            await self.policy.rest()
            await self.pool.wake("kv_cache")
