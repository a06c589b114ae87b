"""Device functions that load and store one tile of a matrix. Elements outside the masks load as 0.

Masks are one-dimensional: `rows_in` and `columns_in` are True for the rows and columns that exist.
Row numbers become int64 before they are multiplied by a stride.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, stride, rows, columns, rows_in, columns_in):
    """Return matrix[rows, columns] as [ROWS, COLUMNS]. Rows lie `stride` elements apart."""
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :],
        mask=rows_in[:, None] & columns_in[None, :],
        other=0.0,
    )


@triton.jit
def load_transposed(ptr, stride, rows, columns, rows_in, columns_in):
    """Return matrix[rows, columns] transposed, as [COLUMNS, ROWS]: an operand of a product."""
    return tl.load(
        ptr + rows.to(tl.int64)[None, :] * stride + columns[:, None],
        mask=columns_in[:, None] & rows_in[None, :],
        other=0.0,
    )


@triton.jit
def store_rows(ptr, stride, rows, columns, rows_in, columns_in, tile):
    """Store the tile [ROWS, COLUMNS] to matrix[rows, columns], in the matrix's dtype."""
    address = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    in_bounds = rows_in[:, None] & columns_in[None, :]
    tl.store(address, tile.to(ptr.dtype.element_ty), mask=in_bounds)


@triton.jit
def store_transposed(ptr, stride, rows, columns, rows_in, columns_in, tile):
    """Store the tile [COLUMNS, ROWS] to matrix[rows, columns], in the matrix's dtype."""
    address = ptr + rows.to(tl.int64)[None, :] * stride + columns[:, None]
    in_bounds = columns_in[:, None] & rows_in[None, :]
    tl.store(address, tile.to(ptr.dtype.element_ty), mask=in_bounds)
