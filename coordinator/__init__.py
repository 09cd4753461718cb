"""What a run's owner runs: manifest, first peer, the local swarm, status. Never on the training path.

May import `dht`, `protocol` and `common`. `node` and `coordinator` never import each other.
"""
