"""What a host serves: the runtime that owns the weights, inputs kept for backward, the gRPC service.

Imported by node/host.py; nothing here knows of the DHT.
"""
