"""Stacked experts: products for many at once, gradients by hand, Adam for those with tokens. Part of `node/model`.

A host's forward is `layer.py`, `tiles.py`, `block.py`, `kinds.py`. A new kind of expert is a class in `kinds.py`.
"""
