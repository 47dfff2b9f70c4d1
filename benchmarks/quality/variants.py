"""The attention variants of the table, as overrides of a recipe."""

BACKBONE = "--model.model.config.backbone."

SOFTMAX = "softmax"
"""The variant that all others are compared with."""

VARIANTS: dict[str, dict[str, str]] = {
    SOFTMAX: {},
    "softmax_gate": {"attention": "softmax", "output_gate": "element"},
    "softmax_exclusive": {"attention": "softmax", "exclusive": "true"},
    "diff_v1": {},
    "diff_v2": {},
    "diff_grouped": {},
    "diff_grouped_gate": {"attention": "diff_grouped", "output_gate": "element"},
}
"""Settings of the backbone, by variant; without `attention`, it is the variant's name."""

ABLATIONS: dict[str, dict[str, str]] = {
    "v1_shared_q": {"attention": "diff_v1", "share": "q"},
    "v1_shared_k": {"attention": "diff_v1", "share": "k"},
    "v1_constant_lambda": {"attention": "diff_v1", "lambda_init": "0.8"},
    "v1_no_norm": {"attention": "diff_v1", "headwise_norm": "false"},
    "v1_add": {"attention": "diff_v1", "combine": "add"},
}
"""Ablations of v1 (differential transformer, table 6, and its reviews)."""

ALL = {**VARIANTS, **ABLATIONS}


def overrides(variant: str) -> list[str]:
    """The overrides of a recipe for a variant."""
    settings = dict(ALL[variant])
    attention = settings.pop("attention", variant)
    return [
        f"--vars.attention={attention}",
        *(f"{BACKBONE}{name}={value}" for name, value in settings.items()),
    ]
