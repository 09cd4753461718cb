"""Replicas kept in sync, beside training: gossip's arithmetic, exchanges of pairs, downloads for joiners.

Experts' blocks on hosts and the trunk on trainers go through the same code. May import `node/rpc` and what lies below.
"""
