"""Joining a run and being reachable in it: DHT, manifest, directory, relays, and where others call this node.

Every role begins here. May import `node/rpc` and what lies below it, and `dht`.
"""
