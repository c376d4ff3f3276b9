"""The losses that are compared: groups as docs/loss.md defines them, and what each engine of one is given."""

from dataclasses import dataclass

TEMPERATURE = 0.01


@dataclass(frozen=True)
class Loss:
    """Groups (c, blocks, e): coefficient, blocks of negatives, copies of the positive in the denominator.

    With a margin, a negative of row i is dropped where its cosine exceeds that of the positive by more. `operations` are those of the
    bare products that tiles need, counted in B^2 d: every cosine twice, then 2 for each tower that a block sends gradients to, and
    where both sides are the same tower half of the cosines.
    """

    groups: tuple[tuple[float, tuple[str, ...], int], ...]
    temperature: float = TEMPERATURE
    margin: float | None = None
    operations: int = 12
    # Whose step of our own is the same work, for ratios.
    own: str = ""


QWEN3 = ((1.0, ("QP", "QQ", "PP"), 1),)
LOSSES = {
    "samtone_query": Loss(((1.0, ("QP", "QQ"), 1), (1.0, ("PQ",), 1)), own="samtone_query"),
    "samtone_query_joint": Loss(((1.0, ("QP", "QQ", "PQ"), 2),), own="samtone_query"),
    # At the temperature of memeff's own example of this loss: it shifts every logit by 1/temperature, which at 0.01 puts its sums near
    # the smallest numbers of f32.
    "qwen3": Loss(QWEN3, temperature=0.05, margin=0.1, operations=16, own="qwen3"),
    "qwen3_cold": Loss(QWEN3, margin=0.1, operations=16, own="qwen3"),
    "clip": Loss(((0.5, ("QP",), 1), (0.5, ("PQ",), 1)), temperature=0.05, operations=8, own="clip"),
}
