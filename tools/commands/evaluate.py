"""The group of verbs that ask what features, and the models that made them, are worth."""

import typer

from tools.commands import evaluate_features, evaluate_models

app = typer.Typer(
    help="What features and models are worth.", no_args_is_help=True, rich_markup_mode=None
)
for verb in (
    evaluate_features.attributes,
    evaluate_features.published_probe,
    evaluate_features.weights,
    evaluate_features.disentanglement,
    evaluate_features.fewshot,
    evaluate_features.knn,
    evaluate_features.linear,
    evaluate_features.regression,
    evaluate_models.attribute_loss,
    evaluate_models.timestep_loss,
    evaluate_models.reconstruction,
    evaluate_models.counterfactual,
):
    app.command()(verb)
