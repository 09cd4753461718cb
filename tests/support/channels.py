"""Channels without certificates, as a peer written by hand opens them, and never through a proxy for websites."""

from __future__ import annotations

import grpc

OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    # One connection per channel, which a test may break without another's noticing.
    ("grpc.use_local_subchannel_pool", 1),
)


def plain_channel(endpoint: str) -> grpc.Channel:
    """For code that waits."""
    return grpc.insecure_channel(endpoint, options=OPTIONS)


def plain_aio_channel(endpoint: str) -> grpc.aio.Channel:
    """For code that awaits."""
    return grpc.aio.insecure_channel(endpoint, options=OPTIONS)
