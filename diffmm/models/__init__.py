"""The backbone and the models that wrap it."""

from diffmm.models.backbone import Backbone, BackboneConfig
from diffmm.models.text import TextConfig, TextModel

__all__ = [
    "Backbone",
    "BackboneConfig",
    "TextConfig",
    "TextModel",
]
