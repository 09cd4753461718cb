"""The run's page: what `status` prints, in a browser, live and over time. Begins in `command.py`.

It reads the DHT and nothing else, and no node waits for it: killing it costs the run nothing. It holds no secret of the
run. Path of what is shown: dht.directory -> watch -> snapshot -> answers -> app -> the modules in `pages/`.
"""
