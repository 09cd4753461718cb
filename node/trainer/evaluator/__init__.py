"""A trainer as evaluator: offered experts are tried between two steps, and signed for. Part of `node/trainer`.

In order: `evaluation_service.py`, `offers.py`, `evaluator.py`, `held_out_trial.py`, `sequential_test.py`.
"""
