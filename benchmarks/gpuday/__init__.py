"""One short day on a GPU: everything that only a GPU can show, in parts that can be resumed.

`record` keeps the figures, `day` what every part is given, `run` takes the parts in turn within
their shares of the time. A part is a function in a file of its own, listed in `parts`. The parts
that train without a trainer share `bare`, and all that time something share `clock`.
"""
