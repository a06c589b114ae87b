"""Triton kernels, one file per op: kernels first, launcher last.

`<op>.launch` takes the arguments of the op. Which tiles a kernel is launched with stands in
`configs`, how it is launched in `launcher`; device functions that several ops share are in
`products`, `gates` and `dropout`. Imported when an op first runs on a GPU.

With TRITON_INTERPRET=1 in the environment before the import, the same launchers run on CPU tensors.
"""
