"""Continue a text with `model.onnx`, without diffmm or torch, always with the likeliest token."""

import json

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def complete(file: str, prompt: str, max_new_tokens: int = 50) -> str:
    """The continuation of a prompt."""
    session = onnxruntime.InferenceSession(file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["diffmm"])
    how = about["reader"]["init_args"]
    if how["tokenizer"] == "bytes":
        encode, decode = str.encode, lambda ids: bytes(ids).decode(errors="replace")
    else:
        tokenizer = Tokenizer.from_str(how["definition"])
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        decode = tokenizer.decode
    past = {
        port.name: np.zeros((1, 0, *port.shape[2:]), np.float32)  # [B, P, ...]
        for port in session.get_inputs()
        if port.name.startswith("past_")
    }
    tokens, new = np.array([[*how.get("start_ids", ()), *encode(prompt)]]), []
    while len(new) < max_new_tokens:
        inputs = {"tokens": tokens, "num_padding": np.zeros(1, np.int64), **past}
        logits, *present = session.run(None, inputs)
        token = int(logits[0, -1].argmax())
        if token == about["eos_id"]:
            break
        new.append(token)
        tokens, past = np.array([[token]]), dict(zip(past, present, strict=True))
    return decode(new)
