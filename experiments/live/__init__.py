"""Real hosts as real processes, and faults put in their way: where the experts of a trial are.

May import `experiments/arms`, `experiments/harness`, `node`, and of `coordinator` what starts processes.
"""
