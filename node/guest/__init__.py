"""What a host may take of the machine that it is a guest on, and when: measured, and kept.

May be imported by `node/host.py`, `node/averaging/` and `node/serving/`; imports neither of them, and no torch.
"""
