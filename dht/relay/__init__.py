"""Calls to nodes that nobody can dial: relays, reservations with them, and tunnels through them.

May import `dht`, `protocol` and `common`; nothing that lies directly in `dht/` imports it.
"""
