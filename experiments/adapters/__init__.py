"""`adapters`: thousands of tiny adapters around a frozen model that somebody else trained.

`domains` reads the texts and `seed` the model, as small as these need it. `adapting` trains adapters beside the FFNs of
its upper layers, `apart` puts together what was trained apart, `measuring` tests both, and `volunteer` says what an
adapter costs who holds it; `arms` and `experiment` name the trials, and `report` tells their results.

May import `experiments/live`, `experiments/arms` and `experiments/harness`.
"""
