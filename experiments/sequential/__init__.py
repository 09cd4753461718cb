"""`sequential`: a paired test of one expert's update, which stops as soon as it knows.

May import `experiments/arms` and `experiments/harness`.
"""
