"""How far a scorer's sums and its ranking of pairs are from an oracle's."""

import numpy as np

Columns = tuple[np.ndarray, np.ndarray]


def accuracy(
    columns: Columns, truth: Columns, order: np.ndarray | None = None
) -> dict[str, float | None]:
    """Largest error of a sum, and agreement of the margins' order.

    Args:
        columns: (N,) sums of chosen and rejected, in nats.
        truth: (M,) sums of the first M pairs.
        order: Of `columns`, where they are not in the order of the pairs.
    """
    if order is not None:
        back = np.argsort(order)
        columns = (columns[0][back], columns[1][back])
    count = len(truth[0])
    found = np.stack([np.asarray(x, dtype=np.float64)[:count] for x in columns])
    wanted = np.stack(truth)
    margins, true_margins = found[0] - found[1], wanted[0] - wanted[1]
    return {
        "largest_error_nats": float(np.abs(found - wanted).max()),
        "spearman": spearman(margins, true_margins),
        "top_half_overlap": top_half_overlap(margins, true_margins),
    }


def spearman(values: np.ndarray, others: np.ndarray) -> float | None:
    """Correlation of the ranks; None where one of them does not vary."""
    first, second = _ranks(values), _ranks(others)
    if min(np.ptp(first), np.ptp(second)) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def top_half_overlap(values: np.ndarray, others: np.ndarray) -> float:
    """Share of the larger half that both have."""
    half = max(len(values) // 2, 1)
    tops = [set(np.argsort(-x, kind="stable")[:half].tolist()) for x in (values, others)]
    return len(tops[0] & tops[1]) / half
