"""What predicts the inputs of a trained model: its classes, captions or transcripts."""

from typing import TYPE_CHECKING, Any

from diffmm.checks import article
from diffmm.hub.predictions import Predictor, Reading
from diffmm.hub.texts import Captioner, Transcriber
from diffmm.hub.zero_shot import ZeroShotPredictor
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel, ZeroShotClassifier
from diffmm.models.ctc import CTCModel
from diffmm.models.modes import check_evaluation
from diffmm.models.text import TextModel

if TYPE_CHECKING:
    from diffmm.hub.trained import TrainedModel


def predictor_of(trained: "TrainedModel", top_k: int) -> Reading[Any]:
    """The predictor of a trained model.

    Args:
        trained: The model.
        top_k: Number of classes per prediction, if it predicts classes.

    Raises:
        ValueError: If the model predicts nothing about single inputs, is in training mode, or its
            tokenizer is missing.
    """
    model = trained.model
    check_evaluation(model, "predicting")
    if isinstance(model, CaptioningModel):
        _ = trained.tokenizer  # an error before anything is read
        return Captioner(model, trained.reader)
    if isinstance(model, CTCModel):
        if not hasattr(trained.reader, "encoder"):
            raise ValueError(f"the reader of {trained.origin} has no tokenizer: give another one")
        return Transcriber(model, trained.reader)
    if getattr(model, "num_classes", 0) < 1:
        hint = ""
        if isinstance(model, TextModel):
            hint = "; it generates text (generate)"
        elif isinstance(model, ContrastiveModel):
            hint = ": name them (zero_shot; on the command line: --labels a,b,c)"
        name = article(type(model).__name__)
        raise ValueError(f"{trained.origin} contains {name}, which has no classes{hint}")
    kind = ZeroShotPredictor if isinstance(model, ZeroShotClassifier) else Predictor
    return kind(
        model,
        trained.reader,
        trained.class_names,
        multi_label=trained.job.multi_label,
        top_k=top_k,
    )
