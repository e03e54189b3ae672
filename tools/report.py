"""`diti report`: one self-contained HTML page about one run."""

from collections.abc import Callable, Sequence
from typing import Any

from configs.loading import dump_run
from data_pipelines.feature_store import read_manifest
from data_pipelines.object_store import ObjectStore
from pretrain.checkpoint import read_metrics
from pretrain.diti import DiTi
from pretrain.step_clock import PHASES
from pretrain.trained import digest_of, load_diti
from tools import figures
from tools.attribute_probe import ProbeResult
from tools.counterfactual_page import counterfactual_sections
from tools.denoising import FourLosses, four_losses, timestep_losses, to_unit
from tools.evaluate_counterfactual import evaluate_counterfactual
from tools.feature_sections import feature_sections
from tools.labels import read_pixels, read_source
from tools.page import render_page
from tools.pictures import DDIM_STEPS, interpolations, reconstructions, to_pixels

NUM_LOSS_IMAGES = 512
NUM_CURVE_IMAGES = 192
NUM_RECONSTRUCTIONS = 8
NUM_PAIRS = 3


def make_report(
    store: ObjectStore,
    *,
    run_url: str,
    train_url: str,
    test_url: str,
    probes: list[ProbeResult],
    shortcut: str | None = None,
    pairs_urls: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, FourLosses]:
    """The page, and the four losses on it.

    Args:
        train_url: features that probes learn on.
        test_url: features of images that nothing was trained on; their shards are read for the
            losses and pictures.
        probes: from `tools.evaluate_attributes`, the whole feature first.
        shortcut: an attribute that misleads few-shot learning, for a section about it.
        pairs_urls: shard sets of pairs, for sections about counterfactuals.
        say: told what comes next.

    Raises:
        ValueError: the features are not of the run's newest checkpoint, or of too few images.
    """
    model, config, manifest = load_diti(store, run_url)
    metrics = read_metrics(store, run_url, manifest)
    features = read_manifest(store, test_url)
    if features.encoder_sha256 != digest_of(model.encoder):
        raise ValueError(
            f"the features at {test_url} were not made by {manifest.name} of {run_url} but by "
            f"another encoder ({features.checkpoint} of run {features.config.get('name')!r}); "
            f"export them from the run's newest checkpoint"
        )
    samples = read_source(store, features)
    if len(samples) < 2 * NUM_PAIRS:
        raise ValueError(
            f"a report needs at least {2 * NUM_PAIRS} images, {test_url} has "
            f"{len(samples)}; export a larger split"
        )
    images = to_unit(read_pixels(samples, config.data.image_size_px))
    say("computing losses on unseen images")
    losses = four_losses(model, images[:NUM_LOSS_IMAGES])
    faces_a = images[:NUM_PAIRS]
    faces_b = images[NUM_PAIRS : 2 * NUM_PAIRS]
    say("drawing interpolations")
    moved = interpolations(model, faces_a, faces_b)
    say("computing losses by time-step")
    by_timestep = timestep_losses(model, images[:NUM_CURVE_IMAGES])
    sections = feature_sections(
        store,
        train_url=train_url,
        test_url=test_url,
        probes=probes,
        shortcut=shortcut,
        say=say,
    )
    page = {
        "title": config.name,
        "images": f"{manifest.images:,}",
        "steps": f"{manifest.step:,}",
        "latent_dim": model.partition.latent_dim,
        "num_subsets": model.partition.num_subsets,
        "checkpoint": manifest.name,
        "tiles": _tiles(probes, losses),
        "losses": _loss_rows(losses),
        "figures": {
            "loss": figures.loss_curve(metrics),
            "timesteps": figures.timestep_curve(by_timestep, model.partition.timestep_ends),
            "reconstructions": figures.reconstruction_grid(
                reconstructions(model, images[:NUM_RECONSTRUCTIONS])
            ),
            "interpolations": figures.interpolation_grid(
                moved, to_pixels(faces_a)[:, None], to_pixels(faces_b)[:, None]
            ),
        },
        "changes": [(item.name, f"{item.change:.1%}") for item in moved],
        "phases": [(phase, f"{_mean(metrics, f'share/{phase}'):.1%}") for phase in PHASES],
        "peak_share": f"{_mean(metrics, 'peak_share'):.0%}",
        "cf": _counterfactuals(store, model, train_url, pairs_urls, say) if pairs_urls else None,
        "config": dump_run(config),
        **sections,
    }
    return render_page("report.html", page), losses


def _counterfactuals(
    store: ObjectStore,
    model: DiTi,
    train_url: str,
    pairs_urls: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Classifiers learn on the images of the features that probes learn on."""
    found = evaluate_counterfactual(
        store,
        model,
        pairs_urls=pairs_urls,
        labelled_url=read_manifest(store, train_url).source_url,
        steps=DDIM_STEPS,
        on_progress=lambda share, what: say(f"counterfactuals: {what}"),
    )
    return counterfactual_sections(model, found, steps=DDIM_STEPS, say=say)


def _mean(metrics: Sequence[dict[str, Any]], name: str) -> float:
    return sum(line.get(name, 0.0) for line in metrics) / len(metrics)


def _tiles(probes: list[ProbeResult], losses: FourLosses) -> list[dict[str, str]]:
    by_name = {result.name: result for result in probes}
    tiles = [{"value": f"{probes[0].mean:.3f}", "label": "mean average precision of the feature"}]
    for name in ("untrained encoder", "raw pixels"):
        if name in by_name:
            gain = probes[0].mean - by_name[name].mean
            tiles.append({"value": f"{gain:+.3f}", "label": f"against {name}"})
    change = losses.diti / losses.backbone - 1
    tiles.append({"value": f"{change:+.1%}", "label": "loss against the backbone alone"})
    return tiles


def _loss_rows(losses: FourLosses) -> list[dict[str, Any]]:
    labels = {
        "backbone": "none (the backbone alone)",
        "diti": "the image's own",
        "shuffled": "another image's",
        "mean": "the average over images",
    }
    return [
        {
            "label": label,
            "loss": f"{getattr(losses, name):.5f}",
            "relative": f"{getattr(losses, name) / losses.backbone - 1:+.1%}",
            "strong": name == "diti",
        }
        for name, label in labels.items()
    ]
