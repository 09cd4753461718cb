"""Pure torch, no sockets and no clocks: transformer, MoE layer, gates, experts, and the state of a replica.

A layer's forward is `transformer.py`, `moe.py`, `gate/`, then experts: those of this process through
`experts/layer.py`, or those of other peers through `node/trainer/dispatch/`. Imports no other room of `node`.
"""
