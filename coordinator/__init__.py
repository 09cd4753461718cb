"""What a run's owner runs: manifest, bootstrap, the local swarm, status. Never on the training path.

May import dht and protocol. Imported by run_node and tests only; node and coordinator never import each other.
"""
