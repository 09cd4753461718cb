"""The trainer's side of a step: group by peer, call, combine, fail over. Imported by node's MoE layers and trainer."""
