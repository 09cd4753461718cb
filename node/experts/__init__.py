"""A host's experts: stacked weights, the grouped product, sparse Adam. Pure torch: no sockets, no clock.

Imported by node's host and by LocalMoE.
"""
