"""`contribute --train`: the expert of a file learns at home, under the run's trunk and beside its other experts.

The trunk is taken over again from time to time: an expert that learnt under one that has moved on is of little use.
"""

# Shapes: N held-out windows.

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from common.errors import DrainingError, UnavailableError
from common.tasks import until_stopped
from node.averaging.joining import JoinConfig, fetch_replica
from node.contributor.local_expert import ExpertsWithOneLocal, LocalExpertSteps
from node.model.devices import pick_device
from node.model.learning_rate import learning_rate_factor
from node.trainer.dispatch.dispatcher import DispatchConfig, dispatch_over
from node.trainer.evaluator.paired_experts import PairedExperts, paired_experts_model, window_gains
from node.trainer.swarm_client import wait_for_blocks
from node.trainer.train_step import StepConfig, Training, build_model
from node.trainer.trunk_replica import TrunkReplica

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.errors import TooFewExpertsError
    from node.averaging.joining import Downloader
    from node.contributor.config import ContributeConfig
    from node.data import TextDataset
    from node.membership.swarm import Swarm
    from node.model.expert_file import ExpertId, Weights

logger = logging.getLogger(__name__)

TRUNK_EVERY_S = 10.0
BLOCKS_S = 30.0
"""How long to wait for every block of the run to have a host."""

WAIT_FOR_CHANGE_S = 1.0
GAIN_WINDOWS = 256
"""Held-out windows on which it is told what was gained; an evaluator looks at up to four times as many."""

NORMAL_95 = 1.96


class Gain(NamedTuple):
    """What an expert gains over the present one, in nats per token, with half of its 95 % interval (normal)."""

    mean: float
    half: float
    n_windows: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval lies above zero."""
        return self.mean > self.half

    def __str__(self) -> str:
        where = f"on {self.n_windows} held-out windows of this text"
        return f"{self.mean:.2g} ± {self.half:.2g} nats per token over the present one {where}"


class LocalExpert(NamedTuple):
    """An expert that is to learn, and where from."""

    place: ExpertId
    start: Weights


class LocalTraining:
    """Steps of one expert. Belongs to the event loop; what computes runs on threads.

    `weights` are those after the last whole step, of which `done` of `steps` were taken.
    """

    def __init__(
        self,
        config: ContributeConfig,
        swarm: Swarm,
        downloads: Downloader,
        local_expert: LocalExpert,
        dataset: TextDataset,
    ) -> None:
        self._config, self._swarm, self._downloads, self._place = config, swarm, downloads, local_expert.place
        self.weights, self.steps, self.done = local_expert.start, config.train, 0
        manifest, device = swarm.manifest, pick_device(config.device)
        self._dispatcher = dispatch_over(swarm, DispatchConfig(teach=False, seed=config.seed))
        self._experts = ExpertsWithOneLocal(self._dispatcher, local_expert.place, local_expert.start, manifest)
        generator = torch.Generator().manual_seed(manifest.seed)
        model = build_model(manifest, self._experts, generator).to(device)
        steps = StepConfig(batch=config.batch, micro_batches=1, in_flight=1, seed=config.seed)
        self._training = Training(manifest, model, self._experts, dataset, steps, self._wait_for_experts)
        self._trunk = TrunkReplica(self._training)  # before LocalExpertSteps freezes what it is made of
        self._home = LocalExpertSteps(model, self._training.moe_layers[local_expert.place.layer], self._experts, device)

    async def run(self, stop: asyncio.Event, tell: Callable[[int, float], None]) -> None:
        """Train until the last step or until `stop` is set; `tell` hears of each step and its loss, nats per token."""
        await until_stopped(wait_for_blocks(self._swarm.directory, BLOCKS_S), stop)
        loop, rate, trunk_s = asyncio.get_running_loop(), self._first_rate(), 0.0
        for number in range(self.steps):
            try:
                if loop.time() >= trunk_s:
                    await until_stopped(self._take_trunk(), stop)
                    trunk_s = loop.time() + TRUNK_EVERY_S
                # To zero, which rounds off the noise of the last steps.
                lr = rate * (1 - number / self.steps)
                loss = await until_stopped(asyncio.to_thread(self._step, number, lr), stop)
            except DrainingError:
                return
            self.done = number + 1
            tell(self.done, loss)

    async def gain(self, present: Weights) -> Gain:
        """Over the expert that serves now, on held-out windows of one's own text, under the newest trunk."""
        await self._take_trunk()
        return await asyncio.to_thread(self._gain, present)

    def close(self) -> None:
        """End the threads."""
        self._training.close()

    def _step(self, number: int, lr: float) -> float:
        dataset, config, context = self._training.dataset, self._config, self._swarm.manifest.model.context
        ids = dataset.train_batch(number, shard=0, n_shards=1, batch=config.batch, context=context, seed=config.seed)
        loss = self._training.until_enough(lambda windows: self._home.step(windows, lr), ids)
        self.weights = self._experts.weights  # whole, also while a step that nobody waits for any more goes on
        return loss

    def _first_rate(self) -> float:
        """Return the rate of --lr, or the one that the run's hosts use now."""
        optimizer = self._swarm.manifest.optimizer
        run_tokens = max((p.run_tokens for p in self._swarm.directory.peers() if p.role == "trainer"), default=0)
        return self._config.lr or optimizer.expert_lr * learning_rate_factor(optimizer, run_tokens)

    async def _take_trunk(self) -> None:
        try:
            await self._download_trunk()
        except UnavailableError as error:
            if not self._training.version:
                raise UnavailableError(
                    f"the run's trunk, which a trainer of it must give, is not to be had now: {error}"
                ) from error
            logger.warning("The trunk cannot be taken over again, training goes on under the last one: %s", error)

    async def _download_trunk(self) -> None:
        directory, limit = self._swarm.directory, self._swarm.manifest.averaging.clip_radius
        trunks, wanted = directory.snapshot(with_avoided=True).trunk, self._trunk.schema()
        state = await fetch_replica(
            self._downloads, trunks, wanted, JoinConfig(max_distance=limit, timeout_s=BLOCKS_S), random.Random()
        )
        await asyncio.wrap_future(self._trunk.load_state(state))

    def _gain(self, present: Weights) -> Gain:
        manifest, dataset = self._swarm.manifest, self._training.dataset
        trunk = {name: tensor.detach().clone() for name, tensor in self._training.model.state_dict().items()}
        paired_experts = PairedExperts(self._dispatcher, self._place, present, self.weights, manifest)
        model, context = paired_experts_model(manifest, trunk, paired_experts), manifest.model.context
        batches = dataset.held_out_batches(self._config.batch, context, GAIN_WINDOWS * context)
        gains = [gain for ids in batches for gain in window_gains(model, ids)]
        spread = np.std(gains, ddof=1) if len(gains) > 1 else np.inf
        return Gain(float(np.mean(gains)), float(NORMAL_95 * spread / np.sqrt(len(gains))), len(gains))

    def _wait_for_experts(self, error: TooFewExpertsError) -> None:
        """Wait on a compute thread until it is worth trying again; raises DrainingError when leaving."""
        logger.info("Waiting for hosts: %s", error)
        self._dispatcher.wait_for_change(WAIT_FOR_CHANGE_S)
