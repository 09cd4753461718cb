"""A trainer's side of a layer's pass: pairs grouped by peer, called, combined, failed over. Part of `node/trainer`.

In order: `dispatcher.py`, `plan.py`, `delivery.py`, `forward.py` or `backward.py`, `client.py`, and then
`node/rpc/expert_codec.py` and the wire.
"""
