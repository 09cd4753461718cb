"""A swarm for plain Python: `SwarmClient` runs its event loop in a thread, for a researcher's model or a notebook."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import uvloop

from common.errors import UnavailableError
from node.membership.swarm import STOP_TIMEOUT_S, Swarm
from node.trainer.dispatch.client import ExpertClient
from node.trainer.dispatch.dispatcher import DispatchConfig, Dispatcher, dispatch_over
from node.trainer.remote_moe import RemoteMoE
from protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Self

    from dht.directory import Directory
    from node.membership.config import ReachConfig, SwarmConfig
    from protocol.manifest import GateKind, Manifest
    from protocol.security import Caller

R = TypeVar("R")


class SwarmClient:
    """A swarm for synchronous code: `with SwarmClient(config) as swarm: layer = swarm.moe_layer(0, generator)`.

    `make_client` makes what carries the calls: a test's may lose some. Without `reach` it finds an address by itself.
    """

    def __init__(
        self,
        config: SwarmConfig,
        dispatch: DispatchConfig | None = None,
        identity: Identity | None = None,
        make_client: Callable[[Caller], ExpertClient] = ExpertClient,
        reach: ReachConfig | None = None,
    ) -> None:
        self._config, self._dispatch = config, dispatch or DispatchConfig()
        self._identity = identity or Identity.generate()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kilohive-swarm-client", daemon=True)
        self._swarm = Swarm(config, self._identity, reach)
        self._make_client = make_client
        self._dispatcher: Dispatcher

    @property
    def manifest(self) -> Manifest:
        """The run's manifest, checked."""
        return self._swarm.manifest

    @property
    def directory(self) -> Directory:
        """Live view of the swarm; reads are thread-safe."""
        return self._swarm.directory

    @property
    def dispatcher(self) -> Dispatcher:
        """Set `run_tokens` on it before each training step."""
        return self._dispatcher

    @property
    def client(self) -> ExpertClient:
        """Counts the bytes on the wire."""
        return self._dispatcher.client

    def moe_layer(
        self, layer: int, generator: torch.Generator | None = None, gate: GateKind | None = None
    ) -> RemoteMoE:
        """MoE layer `layer` of the run as a torch module, with a gate of its own to train.

        Without `gate` it is of the run's kind; but `topk` where that is `hash`, which needs codes of tokens and so has
        to be asked for (`node.model.token_codes.TokenCodes` makes them).
        """
        model = self.manifest.model
        kind = gate or ("topk" if model.gate == "hash" else model.gate)
        model = replace(model, gate=kind, gate_reads="tokens" if kind == "hash" else "hidden")
        return RemoteMoE(self.dispatcher, layer, generator or torch.Generator().manual_seed(self.manifest.seed), model)

    def wait_for_all_blocks(self, timeout_s: float) -> None:
        """Return once every block has a live replica; raises UnavailableError naming how many have none."""
        self.call(wait_for_blocks(self.directory, timeout_s), timeout_s + 1)

    def call(self, coroutine: Coroutine[Any, Any, R], timeout_s: float) -> R:
        """Run on the client's event loop and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.call(self._open(), self._config.join_timeout_s + STOP_TIMEOUT_S)
        except BaseException:  # interrupted, too: `with` does not call __exit__ when __enter__ raises
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            self.call(self._swarm.leave(), STOP_TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_S)
            self._loop.close()

    async def _open(self) -> None:
        await self._swarm.join()
        self._dispatcher = dispatch_over(self._swarm, self._dispatch, self._make_client)


async def wait_for_blocks(directory: Directory, timeout_s: float) -> None:
    """Return once every block of the run has a live replica."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while lost := directory.snapshot().lost_blocks():
        left_s = deadline - loop.time()
        if left_s <= 0:
            names = ", ".join(map(str, lost[:5]))
            raise UnavailableError(f"{len(lost)} blocks have no live replica after {timeout_s:.0f} s: {names} ...")
        await directory.wait_for_change(min(left_s, 1.0))
