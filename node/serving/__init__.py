"""What a host serves: the runtime that owns the weights, inputs kept for backward, the gRPC service and server.

Imported by node/host.py; the guard and the server are also what node/averaging and node/trainer.py serve with. Nothing
here knows of the DHT.
"""
