"""Stacked experts: the grouped product, its gradients by hand, Adam for those that got tokens. Part of `node/model`.

A host's forward is `layer.py`, `block.py`, `kinds.py`, `grouped.py`. A new kind of expert is a class in `kinds.py`.
"""
