"""Only a host: which blocks it holds, when it works, what it says of itself. `host.py` is its composition root.

Its side of a forward pass is in `serving/`. May import any room but `node/trainer` and `node/contributor`.
"""
