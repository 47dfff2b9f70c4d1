"""Panels: the inputs and the answer of one kind of trained model.

A panel is a module with `suits(trained)`, `describe(trained)` and `build(gr, trained)`, which adds
Gradio's components and events to the current page. A new kind of model is one more module here.
"""

from types import ModuleType

from diffmm.app.panels import captioning, classification, generation, similarity
from diffmm.checks import article
from diffmm.hub.trained import TrainedModel

PANELS: tuple[ModuleType, ...] = (similarity, classification, captioning, generation)


def panel_of(trained: TrainedModel) -> ModuleType:
    """The panel of a trained model.

    Raises:
        ValueError: If there is none for its kind, or it does not say how its inputs are prepared.
    """
    for panel in PANELS:
        if panel.suits(trained):
            _ = trained.reader  # runs its checks
            return panel
    raise ValueError(
        f"{trained.origin} contains {article(type(trained.model).__name__)}, which answers "
        f"nothing: the app is for classifiers, text decoders, and contrastive, captioning and CTC "
        f"models"
    )
