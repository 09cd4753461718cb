"""Keeping replicas in sync, beside training: gossip's arithmetic, exchanges of pairs, downloads for joiners.

Experts' blocks on hosts and the trunk on trainers go through the same code. Imported by node/host.py, node/trainer.py.
"""
