"""`diti data stats`: what a shard set holds, as a table and as one self-contained page."""

from typing import Any

from data_pipelines.set_stats import QUANTITIES, SetStats
from data_pipelines.shard_index import ShardIndex
from tools.figures import histogram_bars
from tools.page import render_page


def make_set_report(index: ShardIndex, stats: SetStats) -> str:
    """The page."""
    size_bytes = sum(shard.size_bytes for shard in index.shards)
    return render_page(
        "stats.html",
        {
            "title": index.url,
            "samples": f"{stats.samples:,}",
            "shards": f"{len(index.shards):,}",
            "size": f"{size_bytes / 2**20:,.1f} MiB",
            "members": [
                _counted(stats, name, count) | {"size": _mean_size(stats, name)}
                for name, count in stats.members.most_common()
            ],
            "problems": [_counted(stats, *item) for item in stats.problems.most_common()],
            "quantities": [
                row | {"figure": histogram_bars(stats.histograms[name], QUANTITIES[name])}
                for name, row in quantity_rows(stats).items()
            ],
        },
    )


def quantity_rows(stats: SetStats) -> dict[str, dict[str, Any]]:
    """Of every quantity that any sample has: count, least, mean and most, as text."""
    return {
        name: {
            "title": quantity.title,
            "unit": quantity.unit,
            "count": f"{histogram.count:,}",
            "least": f"{histogram.least:.4g}",
            "mean": f"{histogram.mean:.4g}",
            "most": f"{histogram.most:.4g}",
        }
        for name, quantity in QUANTITIES.items()
        if (histogram := stats.histograms[name]).count
    }


def _counted(stats: SetStats, name: str, count: int) -> dict[str, str]:
    return {"name": name, "count": f"{count:,}", "share": f"{count / stats.samples:.1%}"}


def _mean_size(stats: SetStats, extension: str) -> str:
    return f"{stats.member_bytes[extension] / stats.members[extension] / 2**10:.1f} KiB"
