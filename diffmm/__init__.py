"""diffmm: differential attention for text, images and sound.

Importing the package is light; import what you need from its parts:

* `diffmm.ops`: `diff_attention` and `AttentionMask`, functions on tensors;
* `diffmm.layers`: the three attention layers and what a transformer block is made of;
* `diffmm.models`: the backbone and the text, image and audio models around it;
* `diffmm.training`: Lightning modules, optimizer groups and schedules.
"""

__version__ = "0.1.0"
