"""Tune the tiles of the Triton kernels on the GPU at hand: `python -m moelora_kernels.tune`.

    sizes.py         the shapes of the linears, from arguments or from a model of transformers
    calls.py         the calls of the kernels that a layer of these sizes makes
    candidates.py    the tiles to try: neighbours of the shipped tile
    check.py         compare the outputs of an op with the reference in float64
    clocks.py        the time of a call
    commit.py        the commit of the checkout
    search.py        check and time the candidates, and choose
    __main__.py      the command

`kernels/common/tuned.py` writes and reads the file with the result.
"""
