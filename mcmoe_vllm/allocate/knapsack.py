"""The multiple-choice knapsack: one column for every item, least cost within a budget."""

from collections.abc import Sequence

import numpy as np

EXACT_STEPS = 2_000_000_000  # beyond, a relaxation: seconds become minutes, and bytes gigabytes
BISECTIONS = 100


def choose(
    costs: np.ndarray, sizes: Sequence[int], budget: int, required: Sequence[int] = ()
) -> np.ndarray:
    """The column of each item [n] with the least summed cost; of equal sums the one that
    leaves least of the budget.

    costs [n, C] finite; sizes [C]: what a column takes of the budget, integers >= 0;
    required: columns that at least one item must take.
    Dynamic programming over items and budget: n * budget * C steps, 2^len(required) times. Where
    those are more than EXACT_STEPS and nothing is required, a price for size decides, and what it
    leaves is filled: the sum is then above the least by no more than one item's step.
    Costs may be inf for columns that are not allowed. Raises ValueError if nothing fits.
    """
    n, columns = costs.shape
    if n * budget * columns > EXACT_STEPS and not required:
        return choose_by_price(costs, np.asarray(sizes), budget)
    masks = 1 << len(required)
    best = np.full((masks, budget + 1), np.inf)  # of the items so far, by size used exactly
    best[0, 0] = 0.0
    taken = np.zeros((n, masks, budget + 1), dtype=np.uint8)
    came = np.zeros((n, masks, budget + 1), dtype=np.uint8)  # the mask before
    for item in range(n):
        following = np.full_like(best, np.inf)
        for column in range(columns):
            size = sizes[column]
            if size > budget:
                continue
            bit = 1 << list(required).index(column) if column in required else 0
            for mask in range(masks):
                reached = best[mask, : budget + 1 - size] + costs[item, column]
                target = following[mask | bit, size:]
                better = reached < target
                target[better] = reached[better]
                taken[item, mask | bit, size:][better] = column
                came[item, mask | bit, size:][better] = mask
        best = following
    left, mask = budget - int(best[masks - 1, ::-1].argmin()), masks - 1
    if not np.isfinite(best[mask, left]):
        raise ValueError(f"nothing fits into a budget of {budget}")
    choice = np.zeros(n, dtype=int)
    for item in reversed(range(n)):
        choice[item] = taken[item, mask, left]
        left, mask = left - sizes[choice[item]], int(came[item, mask, left])
    return choice


def choose_by_price(costs: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """What `choose` does beyond EXACT_STEPS: no more than one item's step above the least cost."""
    rows = np.arange(len(costs))
    spread = np.where(np.isfinite(costs), costs, 0.0)
    low, high = 0.0, 1.0 + 2 * float(spread.max() - spread.min())  # dearer than any gain
    smallest = (costs + high * sizes).argmin(axis=1)
    if sizes[smallest].sum() > budget:
        raise ValueError(f"nothing fits into a budget of {budget}")
    choice = costs.argmin(axis=1)
    if sizes[choice].sum() <= budget:
        return choice
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        fits = sizes[(costs + price * sizes).argmin(axis=1)].sum() <= budget
        low, high = (low, price) if fits else (price, high)
    choice = (costs + high * sizes).argmin(axis=1)
    while True:
        left = budget - sizes[choice].sum()
        gains = costs[rows, choice][:, None] - costs
        gains[sizes[None] - sizes[choice][:, None] > left] = 0.0
        row, column = np.unravel_index(gains.argmax(), gains.shape)
        if gains[row, column] <= 0:
            return choice
        choice[row] = column
