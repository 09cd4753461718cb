"""A file that the run names comes from trainers that have it, and from nobody anything else."""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from common.assets import AssetStore, asset_of
from common.errors import InvalidInputError, KilohiveError, UnavailableError, UnknownRunError
from node.rpc.handlers import CallCounts, unary
from node.rpc.server import NodeServer
from node.trainer.asset_fetch import AssetFetch
from node.trainer.asset_service import SERVICE_NAME, AssetService
from protocol import assets_pb2 as pb
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.limits import MAX_PIECE_BYTES
from protocol.manifest import Manifest, ModelConfig
from protocol.run_assets import DataConfig
from protocol.security import Security

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

DATA = bytes(range(256)) * (9 * MAX_PIECE_BYTES // 1024)  # a little more than two pieces
ASSET = asset_of(DATA)
MANIFEST = Manifest(
    name="named",
    model=ModelConfig(vocab_size=300),
    data=DataConfig(tokenizer=ASSET.sha256, tokenizer_bytes=ASSET.n_bytes),
)
READER = Security(Identity.generate()).caller()


class Trainers:
    """Servers on this machine, each with TLS and a key of its own."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def with_file(self, folder: Path) -> Address:
        store = AssetStore(folder)
        store.add(DATA)
        return await self.serving(AssetService(MANIFEST, store).handler())

    async def answering(self, read: Callable[[pb.AssetRequest, float], Awaitable[pb.AssetPiece]]) -> Address:
        """One that answers what `read` gives it."""
        method: Any = grpc.unary_unary_rpc_method_handler(unary(pb.AssetRequest, read, CallCounts()))
        return await self.serving(grpc.method_handlers_generic_handler(SERVICE_NAME, {"Read": method}))

    async def serving(self, handler: grpc.GenericRpcHandler) -> Address:
        identity = Identity.generate()
        server = NodeServer((handler,), (SERVICE_NAME,), "127.0.0.1", 0, Security(identity))
        await server.start()
        self._stack.push_async_callback(server.drain, 0)
        return Address(identity.peer_id, server.endpoint)


@pytest.fixture
async def trainers() -> AsyncIterator[Trainers]:
    async with AsyncExitStack() as stack:
        yield Trainers(stack)


@pytest.fixture
def store(tmp_path: Path) -> AssetStore:
    return AssetStore(tmp_path / "mine")


def new_fetch(store: AssetStore, told: list[int] | None = None) -> AssetFetch:
    return AssetFetch(READER, MANIFEST.run_id, ASSET, store, (told if told is not None else []).append)


async def false_piece(request: pb.AssetRequest, _timeout_s: float) -> pb.AssetPiece:
    return pb.AssetPiece(data=b"!" * min(MAX_PIECE_BYTES, len(DATA) - request.offset))


async def one_false_piece(request: pb.AssetRequest, timeout_s: float) -> pb.AssetPiece:
    if request.offset:
        raise UnavailableError("this trainer leaves")
    return await false_piece(request, timeout_s)


async def one_true_piece(request: pb.AssetRequest, _timeout_s: float) -> pb.AssetPiece:
    if request.offset:
        raise UnavailableError("this trainer leaves")
    return pb.AssetPiece(data=DATA[:MAX_PIECE_BYTES])


async def test_a_file_comes_piece_by_piece(trainers: Trainers, store: AssetStore, tmp_path: Path) -> None:
    told: list[int] = []
    await new_fetch(store, told).fetch([await trainers.with_file(tmp_path)])
    assert store.find(ASSET) == DATA
    assert told == [MAX_PIECE_BYTES, 2 * MAX_PIECE_BYTES, len(DATA)]


async def test_it_goes_on_with_another_trainer_where_one_breaks_off(
    trainers: Trainers, store: AssetStore, tmp_path: Path
) -> None:
    told: list[int] = []
    sources = [await trainers.answering(one_true_piece), await trainers.with_file(tmp_path)]
    await new_fetch(store, told).fetch(sources)
    assert store.find(ASSET) == DATA
    assert told == [MAX_PIECE_BYTES, 2 * MAX_PIECE_BYTES, len(DATA)]


async def test_what_came_is_kept_for_the_next_try(trainers: Trainers, store: AssetStore, tmp_path: Path) -> None:
    told: list[int] = []
    fetch = new_fetch(store, told)
    with pytest.raises(UnavailableError, match=r"no trainer sends the file .*: this trainer leaves"):
        await fetch.fetch([await trainers.answering(one_true_piece)])
    await fetch.fetch([await trainers.with_file(tmp_path)])
    assert store.find(ASSET) == DATA
    assert told[1] == 2 * MAX_PIECE_BYTES


@pytest.mark.parametrize("lie", [false_piece, one_false_piece])
async def test_false_bytes_are_not_believed_and_cost_no_honest_trainer_its_name(
    trainers: Trainers,
    store: AssetStore,
    tmp_path: Path,
    lie: Callable[[pb.AssetRequest, float], Awaitable[pb.AssetPiece]],
) -> None:
    sources = [await trainers.answering(lie), await trainers.with_file(tmp_path)]
    await new_fetch(store).fetch(sources)
    assert store.find(ASSET) == DATA


async def test_where_all_lie_the_last_answer_is_told(trainers: Trainers, store: AssetStore) -> None:
    with pytest.raises(UnavailableError, match=r"no trainer sends.*sha256: is not that of what was sent"):
        await new_fetch(store).fetch([await trainers.answering(false_piece)])
    with pytest.raises(UnavailableError, match="there is no trainer"):
        await new_fetch(store).fetch([])


async def test_too_many_bytes_that_another_process_left_count_as_none(
    trainers: Trainers, store: AssetStore, tmp_path: Path
) -> None:
    store.gather(ASSET, DATA + b"!")
    await new_fetch(store).fetch([await trainers.with_file(tmp_path)])
    assert store.find(ASSET) == DATA


@pytest.mark.parametrize("n_bytes", [0, MAX_PIECE_BYTES + 1])
async def test_a_piece_that_is_empty_or_too_long_is_refused(
    trainers: Trainers, store: AssetStore, n_bytes: int
) -> None:
    async def read(_request: pb.AssetRequest, _timeout_s: float) -> pb.AssetPiece:
        return pb.AssetPiece(data=bytes(n_bytes))

    with pytest.raises(UnavailableError, match=rf"piece: has {n_bytes} bytes, must have 1 to {MAX_PIECE_BYTES}"):
        await new_fetch(store).fetch([await trainers.answering(read)])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run_id": "other-0"}, UnknownRunError),
        ({"sha256": hashlib.sha256(b"passwords").digest()}, InvalidInputError),
        ({"sha256": b"../../etc/passwd"}, InvalidInputError),
        ({"offset": len(DATA)}, InvalidInputError),
        ({"offset": 1 << 63}, InvalidInputError),
    ],
)
async def test_a_trainer_hands_out_only_what_its_run_names(
    tmp_path: Path, changes: dict[str, Any], error: type[KilohiveError]
) -> None:
    store = AssetStore(tmp_path)
    store.add(DATA)
    store.add(b"passwords")
    fields: dict[str, Any] = {"run_id": MANIFEST.run_id, "sha256": bytes.fromhex(ASSET.sha256), "offset": 0}
    service = AssetService(MANIFEST, store)
    assert (await service.read(pb.AssetRequest(**fields), 1.0)).data == DATA[:MAX_PIECE_BYTES]
    with pytest.raises(error):
        await service.read(pb.AssetRequest(**{**fields, **changes}), 1.0)


async def test_a_trainer_whose_file_was_deleted_says_so(tmp_path: Path) -> None:
    store = AssetStore(tmp_path)
    store.path(store.add(DATA)).unlink()
    request = pb.AssetRequest(run_id=MANIFEST.run_id, sha256=bytes.fromhex(ASSET.sha256))
    with pytest.raises(UnavailableError, match="this trainer has lost the file"):
        await AssetService(MANIFEST, store).read(request, 1.0)
