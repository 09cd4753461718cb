"""The volunteer's page: what the own machine does for a run, and the limits and pauses that its owner sets.

A process of its own, beside the host: it asks the host through the socket in the host's folder, says pause, resume and
leave as the commands do, and reads receipts. Killing it costs the host nothing. Path of what is shown: node.host.status
-> node.host.owner_socket -> watch -> state -> app -> the modules in `pages/`.
"""
