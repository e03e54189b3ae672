"""Which frozen model a run leans on: ours, or one of diffusers."""

from configs.task import AnyBackboneConfig, BackboneConfig
from data_pipelines.object_store import ObjectStore
from pretrain.backbone import Backbone, load_backbone, untrained_backbone
from pretrain.diffusers_backbone import DiffusersBackbone, load_diffusers
from pretrain.diffusers_shapes import untrained_diffusers

Frozen = Backbone | DiffusersBackbone


def load_frozen(store: ObjectStore, config: AnyBackboneConfig, *, image_size_px: int) -> Frozen:
    """The model that `config` pins, for images of this size.

    Raises:
        BackboneError: it is not what is pinned, or does not fit.
        ObjectMissingError: there is no such file.
    """
    if isinstance(config, BackboneConfig):
        return load_backbone(store, config)
    return load_diffusers(store, config, image_size_px=image_size_px)


def untrained_frozen(store: ObjectStore, config: AnyBackboneConfig, image_size_px: int) -> Frozen:
    """One of the same shape, to plan by, its weights on the meta device.

    Only its card need be there, or its folder's JSON.

    Raises:
        BackboneError: there is no card, or no pipeline; or it does not fit.
    """
    if isinstance(config, BackboneConfig):
        return untrained_backbone(store, config)
    return untrained_diffusers(store, config, image_size_px=image_size_px)
