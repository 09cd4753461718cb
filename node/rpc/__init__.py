"""Calls between nodes, for every role: one gRPC server, TLS and signatures, handlers, and the codec of what is sent.

May import `node/model`, whose tensors calls carry, and `node/limits`, which slows calls down. Knows no DHT and no role.
"""
