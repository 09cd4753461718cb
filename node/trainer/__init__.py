"""Only a trainer: the trunk's training step, its checkpoint and its sharing. `trainer.py` is its composition root.

Its side of a forward pass: `train_step.py`, `node/model/transformer.py`, `remote_moe.py` over
`node/model/moe.py`, the gate, `dispatch/`.
May import any room but `node/host` and `node/contributor`.
"""
