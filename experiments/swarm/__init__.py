"""`swarm`: one model in one process, and over swarms that suffer.

May import `experiments/live`, `experiments/arms` and `experiments/harness`.
"""
