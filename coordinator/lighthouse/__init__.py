"""The lighthouse: member of hivemind's DHT, relay and observer in a process on py-libp2p. Begins in `role.py`.

py-libp2p cannot be imported together with hivemind: nothing here imports hivemind or torch, and who is imported by
tests or for `--help` imports no libp2p either. May import protocol, and of dht what needs no hivemind.
"""
