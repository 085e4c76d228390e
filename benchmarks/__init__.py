"""The project's own benchmarks: ``make bench``. What they are made of is in `flora.bench`.

`cases` are the layers with the ratios that flora should reach, `models` whole training steps, `curves` how the cost
grows; `report` writes JSON, docs/benchmarks.md and, by `plots`, the drawings. `plans` holds the cost model behind
``plan="auto"`` against measurement.
"""
