"""Memory between a forward and its backward: inputs, within bounds of time and bytes, and which ids have stepped.

Not thread-safe: owned by the runtime's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from node.model.pairs import Inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.manifest import BlockId

MAX_STEPPED_IDS = 100_000


class RequestKey(NamedTuple):
    """One request of one layer."""

    layer: int
    request_id: bytes


@dataclass(frozen=True)
class CheckedInputs(Inputs):
    """Inputs on the host's device, and the blocks that their pairs touch, each of which was hosted at the check."""

    blocks: frozenset[BlockId]


class ActivationCache:
    """Oldest out first, when `max_bytes` are kept or `max_age_s` have passed."""

    def __init__(self, max_bytes: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._max_bytes, self._max_age_s, self._clock = max_bytes, max_age_s, clock
        self._kept: OrderedDict[RequestKey, tuple[float, CheckedInputs]] = OrderedDict()
        self.n_bytes = 0

    def keep_at_most(self, max_bytes: int) -> None:
        """Stay within so many bytes from now on."""
        self._max_bytes = max_bytes
        while self.n_bytes > max_bytes:
            self._drop_oldest()

    def put(self, key: RequestKey, inputs: CheckedInputs) -> None:
        """Keep `inputs`, dropping older ones to stay within bounds; what alone is too big is not kept."""
        self.take(key)
        self._expire()
        if inputs.n_bytes > self._max_bytes:
            return
        while self.n_bytes + inputs.n_bytes > self._max_bytes:
            self._drop_oldest()
        self._kept[key] = (self._clock(), inputs)
        self.n_bytes += inputs.n_bytes

    def get(self, key: RequestKey) -> CheckedInputs | None:
        """Inputs of `key`, still kept afterwards: a retry may need them again."""
        self._expire()
        entry = self._kept.get(key)
        return entry[1] if entry else None

    def take(self, key: RequestKey) -> CheckedInputs | None:
        """Inputs of `key`, no longer kept."""
        entry = self._kept.pop(key, None)
        if entry is None:
            return None
        self.n_bytes -= entry[1].n_bytes
        return entry[1]

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()
        self.n_bytes = 0

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self._max_age_s
        while self._kept and next(iter(self._kept.values()))[0] < oldest_allowed:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, inputs) = self._kept.popitem(last=False)
        self.n_bytes -= inputs.n_bytes


class SteppedIds:
    """The request ids that have stepped the experts: a retry gets its gradients, but steps nothing."""

    def __init__(self, max_ids: int = MAX_STEPPED_IDS) -> None:
        self._ids: OrderedDict[RequestKey, None] = OrderedDict()
        self._max_ids = max_ids

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._ids

    def add(self, key: RequestKey) -> None:
        """Remember `key`, forgetting the oldest beyond `max_ids`."""
        self._ids[key] = None
        if len(self._ids) > self._max_ids:
            self._ids.popitem(last=False)
