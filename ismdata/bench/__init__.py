"""`ismdata bench`: the road beside its yardsticks and peers, measured in turn on the same files.

`corpus` makes text of any size, `stages` are the measurements, each in a process of its own, `data` puts them in order,
`report` draws what came of them.
"""
