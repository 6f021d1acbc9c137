"""Side-by-side measurements: alignkit against TRL and PEFT, on the same data, adapters and steps.

The way through: `options` reads the command line, `setup` makes what all arms share (model,
adapter, token ids), `plan` says who takes which optimizer steps when, `runner` starts one process
an arm (`worker`) and lets them train in turns, `parity` decides whether they train the same thing,
`flops` says how much of the time was needed, and `output` writes it down.
"""
