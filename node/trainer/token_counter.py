"""How far the run is, in tokens of all its trainers, as one trainer can know it: the clock of the learning rate.

A grow-only counter with one entry per trainer (G-counter; Shapiro et al., "Conflict-free Replicated Data Types", 2011),
fed by what trainers announce. A newcomer cannot know of trainers that left before it came; it takes another trainer's
total as a floor, and counts on from there. Totals lag behind by what others have trained since they last announced
themselves. Without liars none is ahead of the truth, but for what was announced while a look-up was under way. A
trainer that lies about its tokens can push the schedule of the others ahead, never back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.limits import MAX_RUN_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dht.view import PeerInfo

MAX_TRAINERS = 4096
"""Trainers remembered one by one; what any more of them do is known only through the totals that others announce."""


class TokenCounter:
    """The run's tokens, as trainer `own_id` knows them. Never goes back.

    `others` are the own tokens of trainers that were seen before, `floor` the total before: a checkpoint's.
    """

    def __init__(self, own_id: str, own: int = 0, others: Mapping[str, int] | None = None, floor: int = 0) -> None:
        self._own_id = own_id
        self._tokens: dict[str, int] = {own_id: own, **(others or {})}
        self._floor = floor
        # Up to where the floor surely holds all that it will ever hold of a trainer; the rest counts on top of it.
        self._held_by_floor: dict[str, int] = {own_id: own}

    @property
    def own(self) -> int:
        """Tokens that this trainer itself trained on."""
        return self._tokens[self._own_id]

    @property
    def others(self) -> dict[str, int]:
        """Tokens of every other trainer that was ever seen."""
        return {peer_id: tokens for peer_id, tokens in self._tokens.items() if peer_id != self._own_id}

    @property
    def n_trainers(self) -> int:
        """How many trainers, this one included, have trained on anything."""
        return sum(tokens > 0 for tokens in self._tokens.values())

    @property
    def total(self) -> int:
        """Tokens of all trainers, at most MAX_RUN_TOKENS: no peer accepts more."""
        since_floor = sum(self._tokens[peer_id] - held for peer_id, held in self._held_by_floor.items())
        return min(MAX_RUN_TOKENS, max(sum(self._tokens.values()), self._floor + since_floor))

    def add(self, n_tokens: int) -> None:
        """This trainer has trained on `n_tokens` more."""
        self._tokens[self._own_id] += n_tokens

    def observe(self, peers: Iterable[PeerInfo]) -> None:
        """Take in what trainers announce now; peers of other roles and this one's own record do not count."""
        trainers = [peer for peer in peers if peer.role == "trainer" and peer.peer_id != self._own_id]
        for trainer in trainers:
            self._raise(trainer.peer_id, trainer.own_tokens)
        furthest = max(trainers, key=lambda trainer: trainer.run_tokens, default=None)
        if furthest is not None and furthest.run_tokens > self.total:
            self._floor = furthest.run_tokens
            # Of its own tokens and of ours it holds no more than are known here; of others' perhaps all that they said.
            known = {self._own_id, furthest.peer_id} & self._tokens.keys()
            self._held_by_floor = {peer_id: self._tokens[peer_id] for peer_id in known}

    def _raise(self, peer_id: str, tokens: int) -> None:
        known = self._tokens.get(peer_id)
        if known is None and len(self._tokens) >= MAX_TRAINERS:
            return
        if known is None or tokens > known:
            self._tokens[peer_id] = tokens
            # Said after the floor was, which therefore holds no more of this trainer's than this.
            self._held_by_floor.setdefault(peer_id, tokens)
