"""What a volunteer runs, in rooms by role. A forward pass goes through trainer, rpc and host, and ends in model.

    contributor                 an expert that is trained at home and offered to a run
    host | trainer              the two roles, which never import each other
    averaging | membership      replicas kept in sync; joining a run and being reachable in it
    rpc                         one gRPC server, and the channels and codecs of its calls
    model | limits | data       pure torch; what a node may take of its machine; text and tokens

A room may import those on the lines below it, never one beside it, and `dht`, `protocol` and `common`. The contract in
`pyproject.toml` holds this; docs/rooms.md says where a new thing goes.
"""
