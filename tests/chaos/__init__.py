"""Runs killed, cut, damaged and fed with hostile files, at random and for as long as one likes: `make chaos`.

    PYTHONPATH=tests python -m chaos --minutes 10 --seed 1

Each module has one `trial`, which draws what it does from a random generator and says what failed, if anything did. A
trial that failed is done again by its name: `python -m chaos --only kills:1:17`.
"""
