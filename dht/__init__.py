"""Discovery: who is in a run and what they host. `directory.py` is what a step reads; the rest keeps it true.

May import `common` and `protocol`; no torch. `node` and `coordinator` import it. `dht/relay/` builds on what lies here.
"""
