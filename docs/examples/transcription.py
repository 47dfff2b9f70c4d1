"""A CTC model in a training loop of one's own: which syllables are sung, in which order.

The encoder has one token per few frames (`stem="frame"`) and no head; a linear layer classifies
every token, and CTC (Graves et al. 2006) adds up all alignments with the target. Clips are padded;
the encoder ignores the padding, and CTC gets the number of real tokens. `diffmm.training.CTC` does
the same for recipes (`audio_text/prompts_ctc_tiny`).

    python docs/examples/transcription.py       # trains for a minute, prints the error rate
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss
from torchmetrics.text import CharErrorRate

from diffmm.models import AudioConfig, BackboneConfig, CTCConfig, CTCModel

SYLLABLES = "abcdefgh"
RATE_HZ = 4000
BLANK = 0


def draw(count: int, random: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Padded clips of three to five syllables of different lengths, their numbers of samples, and
    what is sung. A syllable is a note with overtones; no two successive ones are equal."""
    clips, texts = [], []
    for _ in range(count):
        length = int(torch.randint(3, 6, (), generator=random))
        steps = torch.randint(1, len(SYLLABLES), (length,), generator=random)
        symbols = steps.cumsum(0) % len(SYLLABLES)
        parts = []
        for symbol in symbols.tolist():
            samples = int(torch.randint(480, 960, (), generator=random))
            phase = 6.2832 * 200 * 2 ** (symbol / 3) / RATE_HZ * torch.arange(samples)
            note = phase.sin() + 0.5 * (2 * phase).sin()
            parts += [note * torch.hann_window(samples), torch.zeros(120)]
        clip = torch.cat(parts)
        clips.append(0.3 * clip + 0.02 * torch.randn(len(clip), generator=random))
        texts.append("".join(SYLLABLES[symbol] for symbol in symbols.tolist()))
    lengths = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths, texts


def train(steps: int = 150, attention: str = "diff_v2") -> float:
    """Train on new clips in every step; return the error rate per symbol of others."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    backbone = BackboneConfig(48, 2, 4, attention=attention, rope="1d")
    config = AudioConfig(
        sample_rate_hz=RATE_HZ, num_mels=32, stem="frame", cls_token=False, pool="mean",
        backbone=backbone,
    )  # fmt: skip
    model = CTCModel(CTCConfig(encoder=config, vocab_size=1 + len(SYLLABLES), blank_id=BLANK))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        waveforms, num_samples, texts = draw(16, random)
        logits, lengths = model(waveforms, num_samples)
        scores = logits.log_softmax(dim=-1)
        targets = torch.tensor([1 + SYLLABLES.index(symbol) for symbol in "".join(texts)])
        sizes = torch.tensor([len(text) for text in texts])
        loss = ctc_loss(scores.transpose(0, 1), targets, lengths, sizes, blank=BLANK)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    waveforms, num_samples, texts = draw(64, random)
    with torch.inference_mode():
        rows = model.greedy(model.eval()(waveforms, num_samples))
    found = ["".join(SYLLABLES[symbol - 1] for symbol in row) for row in rows]
    return float(CharErrorRate()(found, texts))


if __name__ == "__main__":
    print(f"symbol error rate {train():.3f}")
