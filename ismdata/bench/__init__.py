"""`ismdata bench`: what the package does beside its yardsticks and peers, measured in turn on this machine.

`data`: `corpus` makes text of any size, `stages` are the measurements, each in a process of its own, `report` draws
what came of them. `attention`: `workload` draws documents, `cases` and `yardstick` are what is timed (`timing`),
`steps` are training steps, `attention_report` draws. `commands` has the command line of both.
"""
