"""The lighthouse's part of the hivemind DHT in pure Python: its messages, and what is kept of them.

It is meant for a process on py-libp2p, which cannot be imported together with hivemind: nothing here imports hivemind
or torch. May import protocol, and of dht what needs no hivemind.
"""
