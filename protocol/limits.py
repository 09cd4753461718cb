"""Every limit on what a peer may send, by name. Checked before anything is allocated."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 << 20
"""One gRPC message, either way; gRPC refuses a larger one by its length prefix."""

MAX_TENSOR_DIMS = 4
MAX_TENSOR_ELEMENTS = 16 << 20
MAX_TOKENS = 65_536
"""Tokens in one request."""

MAX_PAIRS = 1 << 20
"""(token, expert) pairs in one request."""

MAX_WIDTH = 16_384
"""d_model of a run."""

MAX_EXPERTS_PER_LAYER = 1 << 20
MAX_EXPERTS_PER_TOKEN = 256
MAX_LAYERS = 256
REQUEST_ID_BYTES = 16
MAX_RUN_ID_CHARS = 128
MAX_VALUE = 1e18
"""Largest magnitude of a token or gradient entry: its square still fits a float32."""

MAX_RUN_TOKENS = 1 << 62
MAX_DEADLINE_S = 300.0
"""A caller that asks for more gets this."""

MAX_PIECE_BYTES = 1 << 20
"""Averaging and downloads cut a tensor's values, in its own type, into pieces of at most this many bytes."""

MAX_OFFERED_BLOCKS = 4096
"""The most blocks in one exchange of a pair; the rest waits for the next one."""

MAX_PEER_ID_CHARS = 128
