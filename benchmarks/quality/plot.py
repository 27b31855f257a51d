"""Draw perplexity against true bits from benchmarks/results/perplexity.jsonl.

python benchmarks/quality/plot.py        writes docs/perplexity.png
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def main() -> None:
    rows = [
        json.loads(line)
        for line in (ROOT / "benchmarks/results/perplexity.jsonl").read_text().splitlines()
    ]
    figure = Figure(figsize=(7, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model, colour in zip(models, COLOURS, strict=False):
        # The newest row of each width.
        newest = {row["nominal_bits"]: row for row in rows if row["model"] == model}
        points = sorted(newest.values(), key=lambda row: row["true_bits"])
        loss = [100 * (row["perplexity"] / row["base_perplexity"] - 1) for row in points]
        axes.plot([r["true_bits"] for r in points], loss, "o-", color=colour, label=model)
    axes.set_xlabel("true bits per expert weight (scales and zeros counted)")
    axes.set_ylabel("perplexity lost, %")
    axes.set_yscale("log")
    ticks = (1, 2, 5, 10, 20)
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs/perplexity.png", metadata={"Software": "mcmoe-vllm"})


if __name__ == "__main__":
    main()
