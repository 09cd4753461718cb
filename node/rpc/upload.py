"""A file from a contributor to a trainer or a host: one message that says what comes, then pieces. Both sides.

Nothing is kept of a file that was not announced, allowed and as long as announced.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from common.errors import InvalidInputError, LimitExceededError, UnknownRunError
from node.model.expert_file import ExpertId, check_size
from node.rpc.handlers import ServerStream, streaming
from protocol import contribution_pb2 as pb
from protocol.limits import MAX_PIECE_BYTES
from protocol.parsing import parse_message
from protocol.verdict import Offered

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import grpc
    from google.protobuf.message import Message

    from node.rpc.message_stream import Inbox
    from protocol.manifest import Manifest

    Context = grpc.aio.ServicerContext[Any, Any]

INTAKE = pb.DESCRIPTOR.services_by_name["Intake"].full_name
"""The service of hosts that a file goes to; a trainer's is in `node/trainer/evaluator/`."""

UPLOAD_S = 60.0
"""The longest time that a whole file may take."""

MAX_BEGIN_BYTES = 4096
MAX_PIECE_MESSAGE_BYTES = MAX_PIECE_BYTES + 16


def file_messages(begin: pb.OfferBegin, data: bytes) -> Iterator[bytes]:
    """What is sent of a file, in order."""
    yield pb.OfferMessage(begin=begin).SerializeToString()
    for start in range(0, len(data), MAX_PIECE_BYTES):
        yield pb.OfferMessage(piece=data[start : start + MAX_PIECE_BYTES]).SerializeToString()


def begin_of(offered: Offered, data: bytes) -> pb.OfferBegin:
    """The message that announces a file."""
    return pb.OfferBegin(
        run_id=offered.run_id,
        layer=offered.layer,
        expert=offered.expert,
        n_bytes=len(data),
        sha256=offered.sha256,
    )


async def receive_begin(inbox: Inbox) -> pb.OfferBegin:
    """The first message of a file; raises InvalidInputError if it is something else."""
    message = _unpacked(await inbox.receive(), MAX_BEGIN_BYTES)
    if message.WhichOneof("body") != "begin":
        raise InvalidInputError("message", "is none that begins a file")
    return message.begin


async def receive_file(inbox: Inbox, begin: pb.OfferBegin) -> bytes:
    """The rest: as many bytes as announced, with the announced hash. Raises InvalidInputError for anything else."""
    data = bytearray()
    while (raw := await inbox.receive_or_end()) is not None:
        piece = _unpacked(raw, MAX_PIECE_MESSAGE_BYTES).piece
        if not piece or len(data) + len(piece) > begin.n_bytes:
            raise InvalidInputError("piece", f"is empty, or more than the {begin.n_bytes} bytes that were announced")
        data += piece
    if len(data) != begin.n_bytes:
        raise InvalidInputError("file bytes", f"are {len(data)}, announced were {begin.n_bytes}")
    if hashlib.sha256(data).digest() != begin.sha256:
        raise InvalidInputError("sha256", "is not that of the file")
    return bytes(data)


def offered_in(begin: pb.OfferBegin | pb.AskRequest, manifest: Manifest) -> Offered:
    """What a message is about; InvalidInputError, UnknownRunError unless it is of this run and its grid."""
    if begin.run_id != manifest.run_id:
        raise UnknownRunError("run_id", f"is {begin.run_id[:100]!r}, this node serves {manifest.run_id!r}")
    ExpertId(begin.layer, begin.expert).check(manifest.model)
    if isinstance(begin, pb.OfferBegin):
        check_size(begin.n_bytes, manifest)
    return Offered(run_id=begin.run_id, layer=begin.layer, expert=begin.expert, sha256=begin.sha256)


def upload_handler(
    call: Callable[[ServerStream, Context], Awaitable[Message]], what: str
) -> Callable[[object, Context], Awaitable[bytes]]:
    """Handler of a stream of raw messages around `call`, which raises a KilohiveError for anything that is off."""

    async def answer(_: object, context: Context) -> bytes:
        return (await call(ServerStream(context), context)).SerializeToString()

    return streaming(answer, what)


def _unpacked(raw: bytes, max_bytes: int) -> pb.OfferMessage:
    if len(raw) > max_bytes:
        raise LimitExceededError("message bytes", len(raw), max_bytes)
    return parse_message(pb.OfferMessage, raw)
