"""Settings of other implementations with odd values: each is read or refused, never an accident."""

import contextlib
import math

import pytest

from diffmm.interop.conversion import FAMILIES
from diffmm.interop.names import by_block
from diffmm.models import BackboneConfig, TextConfig, TextModel

NUMBERS = (0, -1, 1, 3, 10**18, 1e-40, -0.5, math.nan, math.inf)
ODD = (*NUMBERS, "2", "", [], [1], {}, True, False, None)


def settings_of(family):
    attention = {"diffllama": "diff_v1", "motif": "diff_v1", "unilm_v1": "diff_v1"}
    attention["unilm_v2"] = "diff_v2"
    backbone = BackboneConfig(
        dim=16, depth=2, num_heads=4, rope="1d", attention=attention.get(family, "softmax")
    )
    config = TextConfig(vocab_size=8, max_length=8, backbone=backbone)
    return FAMILIES[family].write_settings(config)


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.model is TextModel])
def test_every_odd_value_of_every_setting_is_read_or_refused(family):
    settings = settings_of(family)
    assert FAMILIES[family].config_of(settings, "a test").backbone.dim == 16
    names = [*settings, "rope_scaling", "rope_parameters", "num_noise_heads", "k_ratio"]
    num_refused = 0
    for name in names:
        for value in ODD:
            try:
                config = FAMILIES[family].config_of(settings | {name: value}, "a test")
            except ValueError:
                num_refused += 1
            else:
                assert isinstance(config, TextConfig)
    assert num_refused > len(names)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("value", ODD)
def test_odd_values_of_scalings_are_read_or_refused(kind, value):
    scaling = {"rope_type": kind, "factor": 2.0}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = 4
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for name in ("factor", "original_max_position_embeddings", "low_freq_factor", "rope_theta"):
        values = settings_of("llama") | {"rope_scaling": scaling | {name: value}}
        with contextlib.suppress(ValueError):
            config = FAMILIES["llama"].config_of(values, "a test")
            assert config.backbone.rope_scaling.kind == kind
    if value is None:
        assert FAMILIES["llama"].config_of(values, "a test")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_is_refused(kind):
    settings = settings_of("llama") | {"rope_scaling": {"type": kind, "factor": 2.0}}
    with pytest.raises(ValueError, match=f"a test: rope_scaling has rope_type='{kind}', but"):
        FAMILIES["llama"].config_of(settings, "a test")
    partly = settings_of("llama") | {"partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5, but diffmm can hold only 1"):
        FAMILIES["llama"].config_of(partly, "a test")


def test_names_of_blocks_are_listed_together():
    names = [f"layers.{n}.a.1.bias" for n in (0, 1, 2, 5, 7)] + ["norm.weight", "layers.3.b.c"]
    assert by_block(names) == ["layers.0-2,5,7.a.1.bias", "norm.weight", "layers.3.b.c"]
