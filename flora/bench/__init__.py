"""Layers with adapters of many makes on them, timed beside the frozen layer: ``python -m flora bench``.

`case` is a layer and its input, `peers` what is put on it, `timing` how steps are timed and when a figure is not to be
used, `memory` what a step holds; `compare` puts them together, `tables` prints them, `command` reads the options.
"""
