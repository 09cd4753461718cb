"""Credit: what host and trainer share of it. Pairs are counted, receipts are kept, and handed to whoever collects them.

A host's part, which signs, is in `node/host/credit/`, a trainer's, which claims, in `node/trainer/credit/`. Adding up
is a coordinator's, or anybody's: `coordinator/credit/`. May import `node/rpc`. Knows no DHT and no role.
"""
