"""What a volunteer runs: host and trainer, experts, gate, dispatch, runtime, checkpoints, data.

May import dht and protocol. run_node, experiments and tests import it; node and coordinator never import each other.
"""
