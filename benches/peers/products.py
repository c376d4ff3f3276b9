"""Bare bf16 matrix products of the shapes that the loss needs: what no engine that multiplies with this library can undercut.

12 B^2 d: cosines of QP and half of QQ, twice each (recomputed for the gradients), and three gradient products; 9 B^2 d: the same
with cosines computed once.
"""

import torch


class Products:
    """Cosines as (rows x d)(d x B), gradients as (rows x B)(B x d): bf16 in and out, with f32 sums inside, nothing else."""

    gradients = None

    def __init__(self, query: torch.Tensor, passage: torch.Tensor, rows: int, count: int) -> None:
        size, dim = query.shape
        self.query, self.passage, self.rows, self.count = query, passage, min(rows, size), count
        self.tile = torch.empty(self.rows * size, device=query.device, dtype=query.dtype)
        self.out = torch.empty(self.rows, dim, device=query.device, dtype=query.dtype)

    def operations(self) -> int:
        """Multiplications and additions of one run: count * B^2 * d."""
        return self.count * len(self.query) ** 2 * self.query.shape[1]

    def cosines(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        tile = self.tile[: len(rows) * len(columns)].view(len(rows), len(columns))
        return torch.mm(rows, columns.T, out=tile)

    def run(self) -> None:
        half = self.query[: len(self.query) // 2]
        for start in range(0, len(self.query), self.rows):
            rows = self.query[start : start + self.rows]
            if self.count == 12:
                self.cosines(rows, self.query)  # half of QQ, twice
                self.cosines(rows, self.passage)
            else:
                self.cosines(rows, half)
            tile = self.cosines(rows, self.passage)
            for _ in range(3):
                torch.mm(tile, self.passage, out=self.out[: len(rows)])

    def loss(self) -> None:
        return None
