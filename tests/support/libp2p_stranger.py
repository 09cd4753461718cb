"""A libp2p peer that does not behave, as a program, since libp2p cannot be imported beside hivemind.

python -m tests.support.libp2p_stranger not-utf-8|flood ADDRESS
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from multiaddr import Multiaddr

from coordinator.lighthouse.hivemind_pb2 import NodeInfo, PingRequest
from coordinator.lighthouse.wire import framed, request_frame
from dht.packing import place_of_peer

FLOOD_BYTES = 128 << 20
HANDSHAKE = b"\x13/multistream/1.0.0\n"
PING = "DHTProtocol.rpc_ping"


async def main(what: str, address: str) -> None:
    """Connect, misbehave on one stream, and leave; fails unless it was cut off."""
    pair = create_new_key_pair()
    host = new_host(key_pair=pair, sec_opt={NOISE: Transport(pair, noise_privkey=new_noise_key().private_key)})
    peer = info_from_p2p_addr(Multiaddr(address))
    host.set_stream_handler(PING, never_answer)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.connect(peer)
        with trio.fail_after(40):
            await (send_what_is_no_text if what == "not-utf-8" else flood)(host, peer.peer_id)


async def never_answer(_stream: Any) -> None:
    await trio.sleep_forever()


async def send_what_is_no_text(host: Any, peer: Any) -> None:
    """As the name of a protocol."""
    stream = await host.get_network().new_stream(peer)
    await stream.write(HANDSHAKE + b"\x03\xff\xfe\n")
    with contextlib.suppress(BaseLibp2pError):
        while await stream.read(1024):
            pass


async def flood(host: Any, peer: Any) -> None:
    """Ask to be called back, do not answer, and meanwhile send more than anybody has given leave for."""
    stream = await host.new_stream(peer, [PING])
    info = NodeInfo(node_id=place_of_peer(host.get_id().to_bytes()))
    call = request_frame(bytes(16), peer.to_bytes(), PING, PingRequest(peer=info, validate=True))
    await stream.write(framed(call))
    stream.muxed_stream.send_window = FLOOD_BYTES
    with contextlib.suppress(BaseLibp2pError):
        for _ in range(FLOOD_BYTES >> 20):
            await stream.write(bytes(1 << 20))
    with trio.move_on_after(5) as noticing:
        while host.get_network().get_connections(peer):  # noqa: ASYNC110 - libp2p tells nobody
            await trio.sleep(0.05)
    if noticing.cancelled_caught:
        sys.exit("nobody minded")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
