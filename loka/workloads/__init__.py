"""Real models on real data, small enough for one CPU core: what the demo, the tests and the studies train.

`wukong` is a recommendation model and `open_bandit` the click log it learns; `transformer` is a language model and
the source code of Python its text; `quality` judges predictions the way recommendation teams do.
"""
