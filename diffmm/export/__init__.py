"""Trained models as files for other programs: ONNX, `torch.export`, AOTInductor, quantized
weights.

`diffmm.export.signature` states the inputs and outputs of every model, from which all programs are
made; `diffmm.export.formats` is the table of formats.
"""
