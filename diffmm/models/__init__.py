"""The backbone and the models that wrap it."""

from diffmm.models.audio import AudioConfig, AudioModel
from diffmm.models.backbone import Backbone, BackboneConfig
from diffmm.models.captioning import CaptioningConfig, CaptioningModel
from diffmm.models.contrastive import ContrastiveConfig, ContrastiveModel
from diffmm.models.ctc import CTCConfig, CTCModel
from diffmm.models.encoder import Embedded, Encoder, EncoderConfig, register_head
from diffmm.models.image import ImageConfig, ImageModel
from diffmm.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig
from diffmm.models.text import TextConfig, TextModel
from diffmm.models.text_tower import TextTower, TextTowerConfig

__all__ = [
    "AudioConfig",
    "AudioModel",
    "Backbone",
    "BackboneConfig",
    "CTCConfig",
    "CTCModel",
    "CaptioningConfig",
    "CaptioningModel",
    "ContrastiveConfig",
    "ContrastiveModel",
    "Embedded",
    "Encoder",
    "EncoderConfig",
    "ImageConfig",
    "ImageModel",
    "MaskedAutoencoder",
    "MaskedAutoencoderConfig",
    "TextConfig",
    "TextModel",
    "TextTower",
    "TextTowerConfig",
    "register_head",
]
