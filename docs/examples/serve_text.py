"""Continue a text with `model.onnx`, without diffmm or torch, always with the likeliest token."""

import json

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def complete(file: str, prompt: str, max_new_tokens: int = 50) -> str:
    """The continuation of a prompt, at most up to the model's `max_length`."""
    session = onnxruntime.InferenceSession(file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["diffmm"])
    how = about["reader"]["init_args"]
    if how["tokenizer"] == "bytes":
        encode = str.encode
        decode = lambda ids: bytes(id for id in ids if id < 256).decode(errors="replace")  # noqa: E731
    else:
        tokenizer = Tokenizer.from_str(how["definition"])
        tokenizer.encode_special_tokens = True  # as text, where a prompt contains their names
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        decode = tokenizer.decode
    past = {
        port.name: np.zeros((1, 0, *port.shape[2:]), np.float32)  # [B, P, ...]
        for port in session.get_inputs()
        if port.name.startswith("past_")
    }
    tokens, new = np.array([[*how.get("start_ids", ()), *encode(prompt)]]), []
    room = about["max_length"] - tokens.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens: it must have fewer than "
            f"{about['max_length']}"
        )
    while len(new) < min(max_new_tokens, room):
        inputs = {"tokens": tokens, "num_padding": np.zeros(1, np.int64), **past}
        logits, *present = session.run(None, inputs)
        token = int(logits[0, -1].argmax())
        if token in about["stop_ids"]:
            break
        new.append(token)
        tokens, past = np.array([[token]]), dict(zip(past, present, strict=True))
    return decode(new)
