"""What a trained model's experts have learnt: `inspect`, and what experiments measure alike.

`command` is the command. `reading` has the model read held-out windows and sees what its gates choose; `experts`,
`information` and `ablation` say what that tells of each expert, of labels, and of what is lost without some; `findings`
puts it together, `show` and `plot` show it.
"""
