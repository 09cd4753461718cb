"""Experts trained elsewhere: offered, evaluated on trainers, taken in by hosts. Beside the path of a step.

The contributor's side is `node/contribution/command.py`; `node/trainer.py` and `node/host.py` import the other two.
"""
