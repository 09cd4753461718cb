"""Calls between nodes, for every role: one gRPC server, TLS and signatures, handlers, and the codec of what is sent.

A forward call leaves `node/trainer/dispatch/client.py` through `expert_codec.py` and `channels.py`, and arrives through
`server.py`, its interceptors and `handlers.py` at `node/host/serving/service.py`.

May import `node/model`, whose tensors calls carry, and `node/limits`, which slows calls down. Knows no DHT and no role.
"""
