"""Credit, added up: receipts are collected from hosts and trainers, checked, and summed by peer and by team.

The command `credit` does it once, a coordinator every few minutes; what they write can be read by others meanwhile. May
import `dht`, `protocol` and `common`, and nothing of `coordinator` outside this folder.
"""
