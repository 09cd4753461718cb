"""Experts from outside: trained at home, offered, evaluated on trainers, taken in by hosts. Beside the path of a step.

The contributor's side begins at `node/contribution/command.py`; `node/trainer.py` and `node/host.py` import the rest.
"""
