"""Only an exporter: a run's trunk and blocks are taken from live replicas and written as one folder.

Begins in `command.py`. Joins and downloads as a contributor does, so it may import `node/trainer` and every room below
that; never `node/host`. How the folder looks, and how it is read again, is in `node/trainer/exported/`.
"""
