"""Calls between nodes, for every role: one gRPC server, handlers, and the codec of what is sent.

A forward call leaves `node/trainer/dispatch/client.py` through `expert_codec.py` and `protocol/channels.py`, arrives
through `server.py`, its interceptors and `handlers.py`, and is answered by `node/host/serving/service.py`.

May import `node/model`, whose tensors calls carry, and `node/limits`, which slows calls down. Knows no DHT and no role.
"""
